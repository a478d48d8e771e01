"""Attention at realistic sizes: data, derivatives, and the exact values in chunks of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.jvp_attn.attention_cases import (
    Attention,
    Case,
    Named,
    randn,
    relative_error,
    with_tangents,
    without_tangents,
)

# The scores of so many rows, and their derivatives in float64, fit in the memory of a GPU.
ROWS_OF_A_CHUNK = 1024


@dataclass(frozen=True)
class Machine:
    """The device and backend of tests, and the factor by which sizes are smaller than on a GPU."""

    device: torch.device
    backend: str
    shrink: int

    def scaled(self, size: int) -> int:
        """A length or a number of heads, reduced for this machine."""
        return max(size // self.shrink, 1)

    def data(self, case: Case) -> dict[str, Tensor]:
        """The data of a case."""
        return {name: x.to(self.device) for name, x in case.data().items()}

    def cotangents(self, case: Case) -> dict[str, Tensor]:
        """Random cotangents of out and lse, and of out_tangent and mu if there are tangents."""
        out = (case.batch, case.seqlen_q, case.heads, case.head_dim_v)
        lse = (case.batch, case.heads, case.seqlen_q)
        shapes = {"out": (out, case.dtype), "lse": (lse, torch.float32)}
        if case.with_tangent:
            shapes |= {"out_tangent": shapes["out"], "mu": shapes["lse"]}
        return {
            name: randn(*shape, seed=f"cotangent of {name}", dtype=dtype).to(self.device)
            for name, (shape, dtype) in shapes.items()
        }


def outputs(attention: Attention, data: Named) -> dict[str, Tensor]:
    """out and lse, and out_tangent and mu if there are tangents."""
    if any(f"t{x}" in data for x in "qkv"):
        return with_tangents(attention, data)
    return without_tangents(attention, data)


def outputs_and_gradients(
    attention: Attention, data: Named, cotangents: Named
) -> dict[str, Tensor]:
    """The outputs, and the gradients of all data: "grad_q", ..."""
    leaves = {name: x.detach().requires_grad_() for name, x in data.items()}
    results = outputs(attention, leaves)
    moving = [name for name in cotangents if results[name].requires_grad]  # mu may be constant
    gradients = torch.autograd.grad(
        [results[name] for name in moving],
        list(leaves.values()),
        [cotangents[name] for name in moving],
        materialize_grads=True,
    )
    return {
        **{name: x.detach() for name, x in results.items()},
        **{f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


# ----------------------------------------------------------------------------
# Exact values

# The dimension of the rows; other tensors have keys.
_ROWS = {"q": 1, "tq": 1, "out": 1, "out_tangent": 1, "lse": 2, "mu": 2}


def naive_in_chunks(
    case: Case, data: Named, cotangents: Named, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`outputs_and_gradients` of the naive formula in the dtype, a chunk of rows at a time.

    Rows do not depend on each other, and the gradients of keys are sums over them.
    """
    inputs = {name: x.to(dtype) for name, x in {**data, **cotangents}.items()}
    results = {name: torch.zeros_like(inputs[name]) for name in cotangents}
    results |= {f"grad_{name}": torch.zeros_like(inputs[name]) for name in data}

    for start in range(0, case.seqlen_q, ROWS_OF_A_CHUNK):
        rows = range(start, min(start + ROWS_OF_A_CHUNK, case.seqlen_q))
        keys = case.seqlen_k - (case.seqlen_q - rows.stop if case.causal else 0)
        if keys <= 0:
            _part("lse", results["lse"], rows, keys).fill_(-torch.inf)
            continue
        of_chunk = {name: _part(name, x, rows, keys) for name, x in inputs.items()}
        found = outputs_and_gradients(
            case.naive, *({name: of_chunk[name] for name in names} for names in (data, cotangents))
        )
        for name, x in found.items():
            _part(name.removeprefix("grad_"), results[name], rows, keys).add_(x)
    return results


def _part(name: str, x: Tensor, rows: range, keys: int) -> Tensor:
    if name in _ROWS:
        return x.narrow(_ROWS[name], rows.start, len(rows))
    return x[:, :keys]


def assert_accurate(
    found: Mapping[str, Tensor], case: Case, data: Named, cotangents: Named
) -> None:
    """Each error is at most twice that of torch's attention.

    That computes half precision in float32 and rounds the results. One rounding is always allowed,
    and as float32 outputs come from half-precision inputs, it is one of the inputs' dtype.
    """
    exact = naive_in_chunks(case, data, cotangents, torch.float64)
    torchs = naive_in_chunks(case, data, cotangents, torch.float32)
    assert_at_most_twice_the_error(found, torchs, exact, case.dtype)


def assert_at_most_twice_the_error(
    found: Named, torchs: Named, exact: Named, dtype: torch.dtype
) -> None:
    """As `assert_accurate`, given torch's results in float32, and the dtype of the inputs."""
    errors, allowed = errors_and_limits(found, torchs, exact, dtype)
    assert all(errors[name] <= allowed[name] for name in errors), (errors, allowed)


def errors_and_limits(
    found: Named, torchs: Named, exact: Named, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, float]]:
    """The errors of results by name, and what `assert_accurate` allows."""
    one_rounding = torch.finfo(dtype).eps / 2
    errors, allowed = {}, {}
    for name, x in found.items():
        assert x.shape == exact[name].shape, name
        errors[name] = relative_error(x, exact[name])
        allowed[name] = max(2 * relative_error(torchs[name].to(x.dtype), exact[name]), one_rounding)
    return errors, allowed
