"""Blocks of a network by torch.compile, one block at a time, with exact JVPs.

torch.func.jvp of a compiled function raises, but a compiled function may contain a jvp. So each
block gets a `forward` that leaves the transform around it and calls one of two compiled functions:

    without tangents    the block, with or without gradients
    with tangents       (block, primals, tangents) -> outputs and their tangents, without gradients

jvp_attn.checkpoint_primal uses both: the second in the forward pass; the first, with gradients, in
the backward pass. Hooks of the block, such as those of FSDP2, run outside of compiled functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from rcm.errors import RunError
from rcm.jvp_rules import RULES, without_rules

Function = Callable[..., Any]
Backend = str | Function

# Of each function of a class: blocks may differ, train or not, and get several batch sizes.
MAX_GRAPHS = 64


def compile_blocks(blocks: Iterable[nn.Module], backend: Backend = "inductor") -> None:
    """Compile the forward method of each block, in place; its first calls take the time.

    Blocks of one class share their graphs, also those of several networks, unless they differ in
    more than their weights. A block is one graph; what torch.compile would split raises. Under a
    TorchDispatchMode, such as FlopCounterMode, blocks run uncompiled.

    backend: that of torch.compile.

    Raises NotImplementedError for a block with dropout, because the two functions would draw
    different masks, and for a block whose forward method is replaced already. Calls of the block
    raise RunError if it cannot be compiled. They raise NotImplementedError inside of transforms of
    torch.func other than one jvp, and of dual numbers. Inside of a jvp they also raise it if
    gradients are enabled and an argument has a tangent, if a weight has one, and if the block
    modifies an argument in place.
    """
    for block in blocks:
        name = type(block).__name__
        if any(isinstance(module, _DropoutNd) and module.p > 0 for module in block.modules()):
            raise NotImplementedError(
                f"{name} has dropout, which compiled blocks do not support: set it to 0 or do not "
                "compile"
            )
        if "forward" in vars(block):
            raise NotImplementedError(f"the forward method of this {name} is replaced already")
        block.forward = _CompiledForward(block, backend)


class _CompiledForward:
    """The forward method of a block, with the arguments and outputs of the original."""

    def __init__(self, block: nn.Module, backend: Backend) -> None:
        self.block, self.name = block, type(block).__name__
        self.function = type(block).forward
        self.primal, self.jvp = _compiled(self.function, backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_in_torch_dispatch_mode(include_infra_modes=False):  # torch.compile would raise
            return self.function(self.block, *args, **kwargs)
        if not _inside_jvp():
            return self._run(self.primal, args, kwargs)
        self._raise_unless_one_jvp()
        self._raise_if_weights_move()
        leaves, spec = tree_flatten((args, kwargs))
        duals = [_unpacked(x) for x in leaves]
        places = tuple(i for i, (_, tangent) in enumerate(duals) if tangent is not None)
        if places and torch.is_grad_enabled():
            raise NotImplementedError(
                f"a compiled {self.name} has no gradient through its tangent: call "
                "it through jvp_attn.checkpoint_primal or inside of torch.no_grad()"
            )
        if places and not _transforms():
            raise NotImplementedError(
                f"a compiled {self.name} takes no dual numbers of torch.autograd.forward_ad: use "
                "torch.func.jvp, or run without compile"
            )
        with temporarily_clear_interpreter_stack():
            primals = [_unwrapped(primal) for primal, _ in duals]
            before = _versions(primals)
            if places:
                tangents = [_unwrapped(duals[i][1]) for i in places]
                outputs, out_tangents = self._run(
                    self.jvp, *tree_unflatten(primals, spec), places, tangents
                )
            else:
                outputs = self._run(self.primal, *tree_unflatten(primals, spec))
        self._raise_if_modified(primals, before)
        return _with_tangents(outputs, out_tangents) if places else outputs

    def _raise_unless_one_jvp(self) -> None:
        transforms = _transforms()
        if len(transforms) > 1 or any(t.key() != TransformType.Jvp for t in transforms):
            active = ", ".join(t.key().name.lower() for t in transforms)
            raise NotImplementedError(
                f"a compiled {self.name} works inside of one torch.func.jvp and no other transform "
                f"of torch.func, got (outermost first) {active}: run without compile"
            )

    def _raise_if_weights_move(self) -> None:
        for name, x in chain(self.block.named_parameters(), self.block.named_buffers()):
            if is_functorch_wrapped_tensor(x) or _unpacked(x)[1] is not None:
                raise NotImplementedError(
                    f"{name} of a compiled {self.name} has a tangent or was computed inside of the "
                    "jvp; only arguments may have tangents: run without compile"
                )

    def _raise_if_modified(self, primals: list[Any], before: list[int]) -> None:
        for x, old, new in zip(primals, before, _versions(primals), strict=True):
            if old != new:
                raise NotImplementedError(
                    f"inside of a jvp, a compiled {self.name} must not modify its arguments in "
                    f"place, but it modified one of shape {tuple(x.shape)}: let it modify a clone"
                )

    def _run(self, compiled: Function, *args: Any) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            with without_rules():  # it has its own
                return compiled(self.block, *args)
        except TorchDynamoException as error:
            raise RunError(
                f"{self.name} cannot be compiled: {_reason(error)}. Run without compile"
            ) from error
        except FailOnRecompileLimitHit as error:
            raise RunError(
                f"{self.name} needs more than {MAX_GRAPHS} compiled graphs, because its blocks or "
                "the shapes of its inputs differ: run without compile"
            ) from error


def _reason(error: Exception) -> str:
    """The first line of the compiler's message, and what it says of the code."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    context = [line.partition(":")[2].strip() for line in rest if "debug context:" in line]
    return f"{first} ({context[0]})" if context and context[0] else first


# ---- inside of a jvp ---------------------------------------------------------------------------


def _transforms() -> list[Any]:
    """The active transforms of torch.func, outermost first."""
    return torch._C._functorch.get_interpreter_stack() or []


def _inside_jvp() -> bool:
    """Whether a transform of torch.func or a dual level is active."""
    return bool(_transforms()) or forward_ad._current_level >= 0


def _unpacked(x: Any) -> tuple[Any, Tensor | None]:
    """An argument without its tangent, and its tangent."""
    if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
        dual = forward_ad.unpack_dual(x)
        return (x, None) if dual.tangent is None else (dual.primal, dual.tangent)
    return x, None


def _unwrapped(x: Any) -> Any:
    """The tensor that torch.func.jvp has wrapped; gradients pass if enabled. Others as they are."""
    if not isinstance(x, Tensor):
        return x
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    # Otherwise torch.compile would make a new graph where another tensor requires grad.
    return x if torch.is_grad_enabled() else x.detach()


def _versions(values: list[Any]) -> list[int]:
    """How often each tensor was modified in place; tensors of inference mode do not count it."""
    return [x._version if isinstance(x, Tensor) and not x.is_inference() else 0 for x in values]


def _with_tangents(outputs: Any, tangents: tuple[Tensor | None, ...]) -> Any:
    """Outputs whose tensors have these tangents in the surrounding jvp."""
    flat, spec = tree_flatten(outputs)
    rest = iter(tangents)
    for i, x in enumerate(flat):
        if isinstance(x, Tensor) and (tangent := next(rest)) is not None:
            flat[i] = forward_ad.make_dual(x, tangent)
    return tree_unflatten(flat, spec)


# ---- the compiled functions --------------------------------------------------------------------


@cache
def _compiled(forward: Function, backend: Backend) -> tuple[Function, Function]:
    """The block's forward method and its jvp, as compiled functions of the block."""

    def primal(block: nn.Module, args: Any, kwargs: Any) -> Any:
        return forward(block, *args, **kwargs)

    def jvp(
        block: nn.Module, args: Any, kwargs: Any, places: tuple[int, ...], tangents: Any
    ) -> tuple[Any, tuple[Tensor, ...]]:
        leaves, spec = tree_flatten((args, kwargs))
        outputs: list[Any] = []

        def tensors_of_outputs(*moving: Tensor) -> tuple[Tensor, ...]:
            full = list(leaves)
            for i, x in zip(places, moving, strict=True):
                full[i] = x
            args, kwargs = tree_unflatten(full, spec)
            flat, outputs_spec = tree_flatten(forward(block, *args, **kwargs))
            outputs.extend((outputs_spec, [None if isinstance(x, Tensor) else (x,) for x in flat]))
            return tuple(x for x in flat if isinstance(x, Tensor))

        with _TraceableRules():
            tensors, out_tangents = torch.func.jvp(  # type: ignore[misc]
                tensors_of_outputs, tuple(leaves[i] for i in places), tuple(tangents)
            )
        outputs_spec, others = outputs
        rest = iter(tensors)
        flat = [next(rest) if other is None else other[0] for other in others]
        return tree_unflatten(flat, outputs_spec), out_tangents

    def compiled(function: Function) -> Function:
        return torch.compile(  # type: ignore[call-overload]
            function,
            backend=backend,
            fullgraph=True,
            dynamic=False,
            recompile_limit=MAX_GRAPHS,
            isolate_recompiles=True,
        )

    return compiled(primal), compiled(jvp)


class _TraceableRules(TorchFunctionMode):
    """Inside, a jvp uses rules (rcm/jvp_rules.py) that torch.compile can trace.

    It cannot trace PyTorch's jvp of layer_norm with weights.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # torch.compile traces it only as a method
            return args[0].unflatten(*args[1:], **kwargs)
        rule = RULES.get(func)
        return func(*args, **kwargs) if rule is None else rule(*args, **kwargs, detached=False)
