"""Derivatives of collectives on each rank, and of the same maps in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
from torch import Tensor
from torch.func import grad, jvp

from rcm.distributed.collectives import (
    AllGather,
    AllToAll,
    LinearCollective,
    Shift,
    apply_collective,
)

RANKS = 3  # with two, a ring has no direction
SHAPES = [(2, 4, 3, 5), (2, 2, 6, 1)]
NAMES = ["heads to tokens", "tokens to heads", "shift", "all-gather"]

Pair = tuple[Tensor, Tensor]
# What of a map, of a rank's two tensors or of those of all ranks, a test looks at.
Results = dict[str, list[Tensor]]


def collective(name: str) -> LinearCollective:
    group = dist.group.WORLD
    assert group is not None
    collectives: dict[str, LinearCollective] = {
        "heads to tokens": AllToAll(group, split=2, join=1),
        "tokens to heads": AllToAll(group, split=1, join=2).transpose.transpose,
        "shift": Shift(group),
        "all-gather": AllGather(group, dim=1),
    }
    return collectives[name]


def in_one_process(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The map of the ranks' tensors, (ranks, ...), to their results, (ranks, ...)."""
    if name == "heads to tokens":
        return [torch.stack([torch.cat(x.chunk(RANKS, 3)[i].unbind(0), 1) for i in range(RANKS)])
                for x in tensors]  # fmt: skip
    if name == "tokens to heads":
        return [torch.stack([torch.cat(x.chunk(RANKS, 2)[i].unbind(0), 2) for i in range(RANKS)])
                for x in tensors]  # fmt: skip
    if name == "shift":
        return [x.roll(1, 0) for x in tensors]
    return [torch.cat(x.unbind(0), 1)[None] for x in tensors]  # all ranks have this one


def shapes(name: str) -> list[tuple[int, ...]]:
    if name == "tokens to heads":
        return [(2, 3, 4, 5), (2, 6, 2, 1)]
    return SHAPES


def inputs(name: str) -> dict[str, list[Tensor]]:
    """Points, directions and weights, of all ranks."""
    generator = torch.Generator().manual_seed(NAMES.index(name))
    return {
        kind: [
            torch.randn(RANKS, *shape, dtype=torch.float64, generator=generator)
            for shape in shapes(name)
        ]
        for kind in ("x", "tx", "v")
    }


def results(
    f: Callable[[Sequence[Tensor]], list[Tensor]],
    x: list[Tensor],
    tx: list[Tensor],
    v: list[Tensor],
) -> Results:
    """Values, tangents and gradients of all kinds. Losses are sums over the ranks."""

    def loss(ys: Sequence[Tensor]) -> Tensor:
        return sum(((i + 1) * y**3).sum() for i, y in enumerate(ys))

    def second(gradients: Sequence[Tensor]) -> Tensor:
        return sum((g * w).sum() for g, w in zip(gradients, v, strict=True))

    xs = [y.clone().requires_grad_() for y in x]
    txs = [y.clone().requires_grad_() for y in tx]
    out, tangent = jvp(lambda *z: f(z), tuple(xs), tuple(txs))
    found = {"out": out, "tangent": tangent}
    both = [a * b for a, b in zip(out, tangent, strict=True)]
    gradients = torch.autograd.grad(loss(out) + loss(both), xs + txs, create_graph=True)
    found["gradients"] = list(gradients)
    found["double backward"] = list(torch.autograd.grad(second(gradients[:2]), xs + txs))

    with torch.no_grad():
        found["without grad"] = jvp(lambda *z: f(z), tuple(x), tuple(tx))[1]
    one_moves = jvp(lambda z: f([x[0], z]), (x[1],), (tx[1],))
    found["of one tangent"] = [*one_moves[0], one_moves[1][1]]
    with fwAD.dual_level():
        ys = f([fwAD.make_dual(a, b) for a, b in zip(x, tx, strict=True)])
        found["dual numbers"] = [part for y in ys for part in fwAD.unpack_dual(y)]
    forward_over_reverse = jvp(grad(lambda *z: loss(f(z)), argnums=(0, 1)), tuple(x), tuple(tx))
    found["forward over reverse"] = [*forward_over_reverse[0], *forward_over_reverse[1]]
    return {name: [y.detach() for y in ys] for name, ys in found.items()}


def outcomes(rank: int) -> dict[str, dict[str, object]]:
    """By collective: the results on this rank, and how many messages a JVP takes."""
    found: dict[str, dict[str, object]] = {}
    for name in NAMES:
        op = collective(name)
        own = {kind: [x[rank] for x in xs] for kind, xs in inputs(name).items()}
        found[name] = {
            "results": results(lambda xs, op=op: apply_collective(op, *xs), **own),
            "messages": messages(op, own["x"], own["tx"]),
            "half precision": [
                y.double() for y in apply_collective(op, *(x.bfloat16() for x in own["x"]))
            ],
        }
    found["errors"] = errors()
    return found


def messages(op: LinearCollective, x: list[Tensor], tx: list[Tensor]) -> int:
    count = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            return function(*args, **kwargs)

        return call

    with (
        patch.object(dist, "all_to_all_single", counted(dist.all_to_all_single)),
        patch.object(dist, "batch_isend_irecv", counted(dist.batch_isend_irecv)),
        patch.object(dist, "all_gather_single", counted(dist.all_gather_single)),
    ):
        jvp(lambda *z: apply_collective(op, *z), tuple(x), tuple(tx))
    return count


def errors() -> dict[str, object]:
    x = torch.zeros(1, 3, 4)
    cases = {
        "heads": lambda: apply_collective(collective("heads to tokens"), torch.zeros(1, 2, 4)),
        "dtypes": lambda: apply_collective(collective("shift"), x, x.double()),
    }
    return {name: _message(case) for name, case in cases.items()}


def _message(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
