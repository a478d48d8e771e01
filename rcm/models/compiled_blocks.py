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
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from rcm.errors import RunError
from rcm.norms import layer_norm

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
    raise RunError if it cannot be compiled, and NotImplementedError if gradients are enabled and an
    argument has a tangent.
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
        leaves, spec = tree_flatten((args, kwargs))
        duals = [_unpacked(x) for x in leaves]
        places = tuple(i for i, (_, tangent) in enumerate(duals) if tangent is not None)
        if not places:
            return self._run(self.primal, args, kwargs)
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"a compiled {self.name} has no gradient through its tangent: call "
                "it through jvp_attn.checkpoint_primal or inside of torch.no_grad()"
            )

        def jvp(primals: list[Any], tangents: list[Tensor]) -> Any:
            return self._run(self.jvp, *tree_unflatten(primals, spec), places, tangents)

        tangents = [duals[i][1] for i in places]
        outputs_spec, *outputs = _OutsideOfTransforms.apply(
            jvp, len(leaves), *(primal for primal, _ in duals), *tangents
        )
        n = len(outputs) // 2
        paired = [
            forward_ad.make_dual(x, tangent) if tangent is not None else x
            for x, tangent in zip(outputs[:n], outputs[n:], strict=True)
        ]
        return tree_unflatten(paired, outputs_spec)

    def _run(self, compiled: Function, *args: Any) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
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


def _unpacked(x: Any) -> tuple[Any, Tensor | None]:
    """An argument without its tangent, and its tangent."""
    if isinstance(x, Tensor) and x.is_floating_point():
        dual = forward_ad.unpack_dual(x)
        return (x, None) if dual.tangent is None else (dual.primal, dual.tangent)
    return x, None


class _OutsideOfTransforms(torch.autograd.Function):
    """(jvp, n, *n primals, *tangents) -> (structure, *outputs, *their tangents or None).

    torch.func calls the rule of a Function outside of its transforms, with the tensors inside of
    theirs.
    """

    @staticmethod
    def forward(jvp: Function, n: int, *leaves: Any) -> tuple[TreeSpec | Any, ...]:
        # Detached, because torch.compile makes a new graph where another tensor requires grad.
        detached = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        outputs, tangents = jvp(detached[:n], detached[n:])
        flat, spec = tree_flatten(outputs)
        rest = iter(tangents)
        return spec, *flat, *(next(rest) if isinstance(x, Tensor) else None for x in flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*(x for x in output if isinstance(x, Tensor)))


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

        with _SupportedNorms():
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


class _SupportedNorms(TorchFunctionMode):
    """Inside, layer_norm with weights is made of operations whose JVP torch.compile can trace."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.functional.layer_norm, torch.layer_norm):
            return layer_norm(*args, **kwargs)
        if func is torch.Tensor.unflatten:  # torch.compile traces it only as a method
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)
