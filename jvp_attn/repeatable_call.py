"""A call that the backward pass can repeat in the surroundings of the first time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class RepeatableCall:
    """A function and its arguments, without the tensors among them.

    Called with these tensors it calls the function, in the surroundings of the first call.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if isinstance(function, partial):
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        self.function = function
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.positions = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        modules = _modules([self.leaves, function, _variables(function)])
        self.tensors_of_modules = [(module, _tensors(module)) for module in modules]
        self.modes = _function_modes()

    def take_tensors(self) -> list[Tensor]:
        """The tensors among the arguments, which the call then no longer holds."""
        tensors = [self.leaves[i] for i in self.positions]
        for i in self.positions:
            self.leaves[i] = None
        return tensors

    def __call__(self, *tensors: Tensor) -> Any:
        leaves = list(self.leaves)
        for i, x in zip(self.positions, tensors, strict=True):
            leaves[i] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        with self._surroundings():
            return self.function(*args, **kwargs)

    def prepare_sharded_modules(self) -> None:
        """Make FSDP2 reduce the gradients of a repeated call and a backward pass right after it.

        Once the backward pass has been through a sharded module, FSDP2 takes every further call in
        it for one of torch's checkpoint, whose hooks it set in the first call. If that was under
        no_grad, it set none, and would drop the gradients of a module that is called twice.
        """
        fsdp = sys.modules.get("torch.distributed.fsdp")  # whose import takes half a second
        if fsdp is None:
            return
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        for module, _ in self.tensors_of_modules:
            for part in module.modules():
                if not isinstance(part, fsdp.FSDPModule):
                    continue
                state: Any = part._get_fsdp_state()
                groups = state._fsdp_param_groups
                if all(x._training_state == TrainingState.POST_BACKWARD for x in groups):
                    state._training_state = TrainingState.IDLE

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with ExitStack() as stack:
            for mode in _missing(self.modes, _function_modes()):
                stack.enter_context(mode)
            for module, tensors in self.tensors_of_modules:
                if _are_others(tensors, _tensors(module)):
                    stack.enter_context(_reparametrize_module(module, dict(tensors)))
            yield


def _function_modes() -> list[TorchFunctionMode]:
    """The active modes, outermost first, that may be entered again.

    Others have an __enter__ of their own, such as torch.device, which is active at most once.
    """
    modes = _get_current_function_mode_stack()
    return [x for x in modes if type(x).__enter__ is TorchFunctionMode.__enter__]


def _missing(
    first: list[TorchFunctionMode], now: list[TorchFunctionMode]
) -> list[TorchFunctionMode]:
    """What to enter so that the innermost modes are the first ones, in their order."""
    present = next(n for n in range(len(first), -1, -1) if now[len(now) - n :] == first[:n])
    return first[present:]


def _modules(tree: Any) -> list[nn.Module]:
    return [x for x in tree_leaves(tree) if isinstance(x, nn.Module)]


def _variables(function: Any) -> list[Any]:
    """What a Python function or method refers to."""
    if isinstance(function, MethodType):
        return [function.__self__, *_variables(function.__func__)]
    if not isinstance(function, FunctionType):
        return []
    names = function.__code__.co_names
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    return values


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _are_others(first: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    """Whether a module has got other tensors; FSDP2's shards and gathered tensors are the same."""
    differ = any(now.get(name, x) is not x for name, x in first.items())
    return differ and not any(_is_sharded(x) for x in (*first.values(), *now.values()))


def _is_sharded(x: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)
