"""Stage smoke: the first launches, each primitive once, on one small problem."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.first_contact.case import Case, Result
from benchmarks.first_contact.long_sequences import check
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.target import Target, target_of
from tests.jvp_attn.attention_cases import Case as Problem

FORWARD = Problem(1, 200, 300, 2, 1, 64, 64, dtype=torch.bfloat16, with_tangent="")
WITH_TANGENTS = Problem(1, 200, 300, 2, 1, 64, 64, dtype=torch.bfloat16)


def cases(settings: Settings) -> Iterator[Case]:
    """A product of torch, one kernel, then the kernels of all derivatives."""
    target = target_of(settings)
    yield Case("torch", partial(_torch, target))
    yield Case("forward", partial(check, target, FORWARD, gradients=False), {"problem": FORWARD})
    for problem, name in ((FORWARD, "backward"), (WITH_TANGENTS, "backward of both")):
        yield Case(name, partial(check, target, problem), {"problem": problem})


def _torch(target: Target) -> Result:
    """A matrix product: whatever fails here has nothing to do with this package."""
    x = torch.randn(256, 256, device=target.device, dtype=torch.bfloat16)
    exact = x.double() @ x.double()
    assert ((x @ x).double() - exact).norm() < 0.01 * exact.norm()
    return {"device": str(target.device), "capability": target.capability}
