"""Stage long_sequences: attention with more work tiles than multiprocessors, against float64.

A block of a Hopper kernel then computes several tiles, one after the other; the small problems of
the kernels stage give it one. Each problem is computed twice, and the results agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.first_contact.case import Case, Result
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.target import Target, target_of
from jvp_attn import flash_attn_jvp
from tests.gpu.machines import (
    Machine,
    errors_and_limits,
    naive_in_chunks,
    outputs,
    outputs_and_gradients,
)
from tests.jvp_attn.attention_cases import Case as Problem
from tests.jvp_attn.attention_cases import Named

# The largest tiles: 192 queries, and 128 keys, whose blocks go through the heads of k and v.
LARGEST_TILE = (192, 128)


def cases(settings: Settings) -> Iterator[Case]:
    """All primitives, head dims and masks; sequences of 16k, and long ones with short others."""
    target = target_of(settings)
    for name, problem in problems(target).items():
        run = partial(check, target, problem, gradients=problem.head_dim <= 128)
        yield Case(name, run, {"problem": problem, "work_tiles": work_tiles(problem)})
    problem = problems(target)["8192, d128, full, no tangents"]
    inputs = {"problem": problem, "deterministic": False}
    yield Case(
        "backward with atomic sums", partial(check_nondeterministic, target, problem), inputs
    )


def problems(target: Target) -> dict[str, Problem]:
    """By name. Random numbers are seeded with the names of tensors (tests/jvp_attn)."""
    head_dims = (64, 128) if target.is_gpu else (128,)
    base = Problem(1, *2 * [target.scaled(8192)], 8, 4, 128, 128, dtype=torch.bfloat16)
    if not target.is_gpu:
        base = replace(base, heads=4, heads_k=2)
    found = {}
    for head_dim in head_dims:
        for causal in (False, True):
            for moving, name in (("qkv", "all tangents"), ("", "no tangents"), ("q", "tq")):
                mask = "causal" if causal else "full"
                found[f"8192, d{head_dim}, {mask}, {name}"] = replace(
                    base, head_dim=head_dim, head_dim_v=head_dim, causal=causal, with_tangent=moving
                )
    odd = replace(base, seqlen_q=target.scaled(8200), seqlen_k=target.scaled(8100), causal=True)
    found["8200 x 8100, d96, causal"] = replace(odd, head_dim=96, head_dim_v=96)
    found["8200 x 8100, d72, causal"] = replace(odd, head_dim=72, head_dim_v=72)
    found["8192, d256, full, outputs"] = replace(base, head_dim=256, head_dim_v=256)
    for q, k in ((16384, 512), (512, 16384), (16384, 16384)):
        sizes = {"seqlen_q": target.scaled(q), "seqlen_k": target.scaled(k)}
        found[f"{q} x {k}, d128, full"] = replace(base, heads=4, heads_k=2, **sizes)
    return found


def work_tiles(problem: Problem) -> dict[str, int]:
    """How many tiles the kernels of queries have at least, and those of keys."""
    rows, keys = LARGEST_TILE
    return {
        "queries": problem.batch * problem.heads * -(-problem.seqlen_q // rows),
        "keys": problem.batch * problem.heads_k * -(-problem.seqlen_k // keys),
    }


def check(target: Target, problem: Problem, *, gradients: bool = True) -> Result:
    """Outputs and gradients of all inputs: errors within their limits, repeatable to the bit."""
    machine = Machine(target.device, "", shrink=1)  # the problem has the sizes of the target
    data, cotangents = machine.data(problem), machine.cotangents(problem)

    def compute() -> dict[str, torch.Tensor]:
        with target.kernels_compute():
            if gradients:
                return outputs_and_gradients(problem.ours, data, cotangents)
            return outputs(problem.ours, data)

    found, again = compute(), compute() if target.is_gpu else None
    result = _accuracy(found, problem, data, cotangents)
    if again is not None:
        differing = [name for name, x in found.items() if not torch.equal(x, again[name])]
        assert not differing, f"a second run differs in {differing}: a race"
    return result


def check_nondeterministic(target: Target, problem: Problem) -> Result:
    """dQ as atomic sums, whose rounding may differ from run to run."""
    machine = Machine(target.device, "", shrink=1)
    data, cotangents = machine.data(problem), machine.cotangents(problem)
    ours = partial(flash_attn_jvp, causal=problem.causal, deterministic=False, return_lse=True)
    with target.kernels_compute():
        found = outputs_and_gradients(ours, data, cotangents)
    return _accuracy(found, problem, data, cotangents)


def _accuracy(found: Named, problem: Problem, data: Named, cotangents: Named) -> Result:
    exact, torchs = (
        naive_in_chunks(problem, data, cotangents, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    errors, limits = errors_and_limits(found, torchs, exact, problem.dtype)
    wrong = {name: (x, limits[name]) for name, x in errors.items() if not x <= limits[name]}
    assert not wrong, f"(error, limit) of {wrong}"
    return {"errors": errors}
