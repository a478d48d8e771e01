"""`checkpoint_jvp`: activation checkpoints inside of a JVP.

`torch.utils.checkpoint.checkpoint` calls a block again in the backward pass. By then a surrounding
`torch.func.jvp` has ended, and the block would get inputs without tangents. Here the checkpoint
encloses a JVP of its own, nested in the surrounding one:

    out, tout = checkpoint(jvp of the block, x, tx)

It saves primals and tangents as ordinary tensors, and its second call starts the same JVP again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._functorch.eager_transforms import jvp_increment_nesting
from torch.autograd.forward_ad import UnpackedDualTensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from jvp_attn.repeatable_call import RepeatableCall
from jvp_attn.transforms import (
    depth,
    innermost,
    inside_jvp,
    no_hidden_tensors,
    raise_if_modified,
    raise_unless_one_jvp,
    unpacked,
    versions,
    without_ended_transforms,
)

_NAME = "checkpoint_jvp"


def checkpoint_jvp(
    function: Callable[..., Any], /, *args: Any, preserve_rng_state: bool = True, **kwargs: Any
) -> Any:
    """Call a block of a network without keeping its activations, also inside of a JVP.

        def model(x):
            for block in blocks:
                x = jvp_attn.checkpoint_jvp(block, x, condition)
            return x

        out, out_tangent = torch.func.jvp(model, (x,), (x_tangent,))
        loss(out, out_tangent).backward()

    The block's inputs and their tangents are kept. The backward pass computes the rest again, by
    one more JVP of the block. Output, tangent and all gradients are those of `function(*args,
    **kwargs)`: gradients for the arguments, their tangents, parameters and all other tensors that
    the function uses, through output and tangent.

    Outside of a JVP this is `torch.utils.checkpoint.checkpoint(use_reentrant=False)`. With grad
    disabled it only calls the function. With dual numbers of `torch.autograd.forward_ad`, the
    backward pass must run after the dual level. Each `torch.overrides.TorchFunctionMode` of the
    first call, such as `replace_sdpa`, is active at the second, wherever the backward pass runs,
    unless it has an `__enter__` of its own, as torch.device has. In a function compiled by
    torch.compile, a jvp that contains `checkpoint_jvp` breaks the graph.

    With FSDP2 (`fully_shard`) the gradients of a jvp are right, but the gathered weights of all
    blocks stay in memory until the end of the backward pass, because FSDP2's post-backward hooks
    do not fire before. With `checkpoint_primal` they fire after each block.

    Args:
        function: the block, usually an nn.Module. Its second call must do the same as the first.
            Parameters that `torch.func.functional_call` replaces around the first call are also
            replaced around the second, if their module is the function, an argument, or a variable
            that the function uses. Tensors that the function stores anywhere but in its result
            lose their tangents.
        args, kwargs: arguments of the function, with tensors also in tuples, lists and dicts. Each
            floating-point tensor may have a tangent.
        preserve_rng_state: whether the second call draws the same random numbers, as dropout must.

    Returns:
        What the function returns: tensors, also in tuples, lists and dicts, and other values.

    Raises:
        ValueError: the result depends on a tensor with a tangent that is not among args and kwargs,
            such as a parameter.
        TypeError: inside of a JVP, the function returns an object that may hide tensors.
        RuntimeError: with grad enabled, the function calls torch.func.grad or vjp.
        NotImplementedError: with grad enabled, inside of transforms of torch.func other than one
            jvp, such as grad, vjp, vmap, or jvp of jvp; inside of a jvp, with torch before 2.13, or
            if the function modifies an argument in place; in a backward pass inside of the dual
            level.
        torch.utils.checkpoint.CheckpointError: in the backward pass, if the second call saves other
            tensors than the first.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return checkpoint(
            partial(function, **kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=preserve_rng_state,
        )
    return _checkpointed(function, args, kwargs, preserve_rng_state)


@torch.compiler.disable(
    reason="checkpoint_jvp inside of a jvp inside of a compiled function: compile without "
    "fullgraph=True, or compile the block"
)
def _checkpointed(
    function: Callable[..., Any], args: Any, kwargs: Any, preserve_rng_state: bool
) -> Any:
    call = RepeatableCall(function, args, kwargs)
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    if inside_jvp():
        return _inside_jvp(run, call)
    return run(call, *call.take_tensors())


# ----------------------------------------------------------------------------
# Inside of a jvp


class _Nesting(threading.local):
    """The number of active transforms where a checkpoint may be: one jvp, and those begun here."""

    depth = 1


_nesting = _Nesting()


@contextmanager
def _nested(depth: int) -> Iterator[None]:
    before, _nesting.depth = _nesting.depth, depth
    try:
        yield
    finally:
        _nesting.depth = before


def _inside_jvp(run: Callable[..., Any], call: RepeatableCall) -> Any:
    raise_unless_one_jvp(_NAME, _nesting.depth)
    duals = [unpacked(x) for x in call.take_tensors()]
    primals = [primal for primal, _ in duals]
    tangents = [tangent for _, tangent in duals if tangent is not None]
    moving = [i for i, (_, tangent) in enumerate(duals) if tangent is not None]
    requires_grad = [innermost(x).requires_grad for x in (*primals, *tangents)]
    body: Callable[..., Any]
    body = partial(_jvp_of_saved, requires_grad, _nesting.depth, call, moving)
    if not depth():
        body = _not_again_in_this_dual_level(body)
    before = versions(primals)
    outputs, spec = run(body, *primals, *tangents)
    raise_if_modified(_NAME, primals, before)
    return tree_unflatten([_packed(x) for x in outputs], spec)


def _not_again_in_this_dual_level(body: Callable[..., Any]) -> Callable[..., Any]:
    """Forbids a second call in this level: autograd would expect dual numbers from it."""
    marker = fwAD.make_dual(torch.zeros(()), torch.zeros(()))
    called = False

    def checked(*tensors: Tensor) -> Any:
        nonlocal called
        if called and fwAD.unpack_dual(marker).tangent is not None:
            raise NotImplementedError(
                "a backward pass through checkpoint_jvp inside of the same "
                "torch.autograd.forward_ad.dual_level() is not supported: call .backward() or "
                "torch.autograd.grad after the level"
            )
        called = True
        return body(*tensors)

    return checked


def _jvp_of_saved(
    requires_grad: list[bool],
    at_depth: int,
    call: RepeatableCall,
    moving: list[int],
    *tensors: Tensor,
) -> Any:
    """`_jvp_at`, of tensors as in the first call.

    What was saved is still wrapped by transforms that have ended. Hooks that pack saved tensors
    detach what is wrapped; whether it requires grad decides what torch saves.
    """
    restored = []
    for x, needs_grad in zip(map(without_ended_transforms, tensors), requires_grad, strict=True):
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
        differs = not is_wrapped and x.requires_grad != needs_grad
        restored.append(x.detach().requires_grad_(needs_grad) if differs else x)
    return _jvp_at(at_depth, call, moving, *restored)


def _jvp_at(at_depth: int, call: RepeatableCall, moving: list[int], *tensors: Tensor) -> Any:
    """`_jvp` inside of `at_depth` transforms, as many as in the first call.

    The backward pass usually runs outside of them. At another depth, the formulas that torch has
    for tangents might save other tensors.
    """
    if depth() >= at_depth:
        with _nested(depth() + 1):
            return _jvp(call, moving, *tensors)
    with jvp_increment_nesting(), _dual_level():
        outputs, spec = _jvp_at(at_depth, call, moving, *tensors)
    return [_map_dual(without_ended_transforms, x) for x in outputs], spec


@contextmanager
def _dual_level() -> Iterator[None]:
    """Begins a level if there is none, as the outermost torch.func.jvp does."""
    if fwAD._current_level >= 0:
        yield
    else:
        with fwAD.dual_level():
            yield


def _jvp(call: RepeatableCall, moving: list[int], *tensors: Tensor) -> tuple[list[Any], Any]:
    """The flat outputs of the call, with (primal, tangent) for each tensor, and their structure.

    Args:
        call: to be differentiated.
        moving: which of its tensors have tangents.
        tensors: all of them, then the tangents.
    """
    n = len(tensors) - len(moving)
    outputs: list[Any] = []
    spec: Any = None

    def along(anchor: Tensor, *duals_in: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        nonlocal outputs, spec
        inputs = list(tensors[:n])
        for i, dual in zip(moving, duals_in, strict=True):
            inputs[i] = dual
        leaves, spec = tree_flatten(call(*inputs))
        outputs = [
            unpacked(x) if isinstance(x, Tensor) else no_hidden_tensors(_NAME, x) for x in leaves
        ]
        duals_out = [x for x in outputs if isinstance(x, UnpackedDualTensor)]
        return anchor, tuple(part for x in duals_out for part in x if part is not None)

    # A jvp needs an input and an output with a tangent: the anchor is both.
    anchor = torch.zeros(())
    primals = (anchor, *(tensors[i] for i in moving))
    *_, results = torch.func.jvp(along, primals, (anchor, *tensors[n:]), has_aux=True)
    remaining = iter(results)
    return [_map_dual(lambda _: next(remaining), x) for x in outputs], spec


def _map_dual(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function to primal and tangent, in this order, and to nothing else."""
    if not isinstance(x, UnpackedDualTensor):
        return x
    primal = function(x.primal)
    return UnpackedDualTensor(primal, None if x.tangent is None else function(x.tangent))


def _packed(x: Any) -> Any:
    """From the result of a jvp to a dual tensor of the surrounding jvp."""
    if not isinstance(x, UnpackedDualTensor):
        return x
    if unpacked(x.primal).tangent is not None:
        raise ValueError(
            "the result of checkpoint_jvp depends on a tensor that has a tangent but is not among "
            "the arguments, such as a parameter or a variable of an enclosing function: pass it to "
            "checkpoint_jvp as an argument, also inside of tuples, lists or dicts"
        )
    return x.primal if x.tangent is None else fwAD.make_dual(*x)
