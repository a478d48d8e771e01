"""A repeated call runs inside of the function modes of the first, whatever is active around it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from jvp_attn.repeatable_call import RepeatableCall


class Replaced(TorchFunctionMode):
    """Replaces one function by another."""

    def __init__(self, function: Any, other: Any) -> None:
        super().__init__()
        self.function, self.other = function, other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.other if func is self.function else func)(*args, **(kwargs or {}))


# Together they replace sin by cos: the outer one replaces what the inner one calls.
OUTER, INNER = Replaced(torch.exp, torch.cos), Replaced(torch.sin, torch.exp)
OTHER = Replaced(torch.sin, torch.tanh)
X = torch.linspace(-1, 1, 5)


@pytest.mark.parametrize(
    "around",
    [[], [OUTER, INNER], [OUTER], [INNER], [OTHER], [OTHER, OUTER], [OUTER, INNER, OTHER]],
)
def test_the_modes_of_the_first_call_are_active_in_their_order(around: list[Replaced]) -> None:
    with OUTER, INNER:
        call = RepeatableCall(torch.sin, (X,), {})
        assert torch.equal(call(X), X.cos())
    with ExitStack() as stack:
        for mode in around:
            stack.enter_context(mode)
        assert torch.equal(call(X), X.cos())
        assert _get_current_function_mode_stack() == around


def test_modes_that_are_active_already_are_not_entered_again() -> None:
    calls = []

    class Counted(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Counted():
        call = RepeatableCall(torch.sin, (X,), {})
        with INNER:
            RepeatableCall(torch.sin, (X,), {})(X)
        calls.clear()
        call(X)
    assert calls == [torch.sin]


def test_the_default_device_stays_that_of_the_repeated_call() -> None:
    """torch.device is a mode that must not be entered twice."""
    with torch.device("meta"), INNER:
        call = RepeatableCall(torch.zeros, (3,), {})
        assert call().is_meta
    assert call().device.type == "cpu"
    with torch.device("meta"):
        assert call().is_meta
    assert torch.get_default_device().type == "cpu"
    assert not _get_current_function_mode_stack()
