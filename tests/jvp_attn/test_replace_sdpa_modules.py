"""Inside `replace_sdpa()`, the attention modules of torch have tangents and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.func import jvp

from jvp_attn import replace_sdpa
from tests.jvp_attn.attention_cases import assert_close, named, peak_and_largest_allocation
from tests.jvp_attn.sdpa_callers import HEADS, MODULES, TOKENS, TTOKENS, WIDTH, by_torch


@contextmanager
def without_fused_paths() -> Iterator[None]:
    """The layers of torch.nn.Transformer call functions that have derivatives."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("what", MODULES)
def test_modules_of_torch_have_tangents_and_gradients(what: str) -> None:
    module, call = MODULES[what]
    weights = list(module.parameters())

    def outputs_and_gradients() -> Any:
        outputs = jvp(partial(call, module), (TOKENS,), (TTOKENS,))
        return outputs, torch.autograd.grad(sum(x.pow(3).sum() for x in outputs), weights)

    with replace_sdpa():
        actual = outputs_and_gradients()
    assert_close(named(actual), named(by_torch(outputs_and_gradients)))


@pytest.mark.parametrize("what", MODULES)
def test_modules_of_torch_skip_their_fused_paths(what: str) -> None:
    module, call = MODULES[what]
    with torch.no_grad():
        with replace_sdpa():
            actual = jvp(partial(call, module), (TOKENS,), (TTOKENS,))
        with without_fused_paths():
            expected = by_torch(jvp, partial(call, module), (TOKENS,), (TTOKENS,))
    assert_close(named(actual), named(expected))


@pytest.mark.parametrize(
    "modes",
    [
        (replace_sdpa, replace_sdpa),
        (partial(torch.device, "cpu"), replace_sdpa),
        (replace_sdpa, partial(torch.device, "cpu")),
    ],
    ids=["itself", "inside", "around"],
)
def test_modules_of_torch_work_under_other_modes(modes: tuple[Any, Any]) -> None:
    """Other modes, such as that of `torch.set_default_device`, may be active."""
    module, call = MODULES["MultiheadAttention"]
    outer, inner = modes
    with outer(), inner():
        actual = jvp(partial(call, module), (TOKENS,), (TTOKENS,))
    assert_close(named(actual), named(by_torch(jvp, partial(call, module), (TOKENS,), (TTOKENS,))))


def test_modules_use_the_attention_of_this_package() -> None:
    module, _ = MODULES["MultiheadAttention"]
    x = torch.zeros(1, 1024, WIDTH, dtype=torch.float64)
    scores = HEADS * x.shape[1] ** 2 * x.element_size()

    def largest() -> int:
        with torch.no_grad():
            return peak_and_largest_allocation(lambda: module(x, x, x, need_weights=False))[1]

    assert by_torch(largest) >= scores
    with replace_sdpa():
        assert largest() < scores / 4
