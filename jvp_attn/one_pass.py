"""`checkpoint_primal`: output and tangent in one pass, with a gradient through the output.

Distillation in continuous time needs F with a gradient, and its derivative D along an ODE without
one. Two passes, a JVP without grad and a forward pass with grad, compute F twice. A single JVP with
grad records a graph of the tangent that nobody uses. Here each block of the network runs once,
without grad, and keeps its inputs; the backward pass computes only its primal again:

    forward    out, tout = jvp of the block         no graph; tout is detached
    backward   out again, with grad                 from the saved inputs, without tangents
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import (
    CheckpointError,
    checkpoint,
    get_device_states,
    set_device_states,
)

from jvp_attn.repeatable_call import RepeatableCall
from jvp_attn.transforms import (
    innermost,
    inside_jvp,
    no_hidden_tensors,
    raise_if_modified,
    raise_unless_one_jvp,
    unpacked,
    versions,
    without_ended_transforms,
)

_NAME = "checkpoint_primal"

# Gives the outputs a graph where no input has one. It is created outside of any transform: a tensor
# that requires grad at the level of a jvp would take the graph there, where no backward pass comes.
_ANCHOR = torch.zeros((), requires_grad=True)


def checkpoint_primal(
    function: Callable[..., Any], /, *args: Any, preserve_rng_state: bool = True, **kwargs: Any
) -> Any:
    """Call a block of a network without keeping its activations, and detach its tangent.

        model.enable_gradient_checkpointing(jvp_attn.checkpoint_primal)       # of diffusers
        out, out_tangent = torch.func.jvp(model, (x, t), (x_tangent, t_tangent))
        loss(out, out_tangent.detach()).backward()

    Inside of a JVP, output and tangent are those of `function(*args, **kwargs)`. The block runs
    without grad, and its floating-point inputs and outputs are all that remains of it. The backward
    pass calls it once more, without tangents, and adds gradients to the arguments, the parameters
    and all other tensors that the function uses.

    The tangent is detached, as under torch.no_grad(): the gradient of a loss that uses it lacks
    what flows through the tangent. For that gradient use `checkpoint_jvp`. The outputs require
    grad, whether or not the function has anything to train.

    Outside of a JVP this is `torch.utils.checkpoint.checkpoint(use_reentrant=False)`. With grad
    disabled it only calls the function. Dual numbers of `torch.autograd.forward_ad` work like a
    jvp. Each `torch.overrides.TorchFunctionMode` of the first call, such as `replace_sdpa`, is
    active at the second, wherever the backward pass runs; so are autocast and parameters that
    `torch.func.functional_call` replaces (see `checkpoint_jvp`).

    Args:
        function: the block, usually an nn.Module. Its second call must do the same as the first.
        args, kwargs: arguments of the function, with tensors also in tuples, lists and dicts. Each
            floating-point tensor may have a tangent.
        preserve_rng_state: whether the second call draws the same random numbers, as dropout must.

    Returns:
        What the function returns: tensors, also in tuples, lists and dicts, and other values.

    Raises:
        TypeError: inside of a JVP, the function returns an object that may hide tensors.
        NotImplementedError: with grad enabled, inside of transforms of torch.func other than one
            jvp, such as grad, vjp, vmap, or jvp of jvp; inside of a jvp, with torch before 2.13, or
            if the function modifies an argument in place; in a backward pass inside of a jvp or a
            dual level, or with create_graph=True.
        RuntimeError: in a backward pass by torch.autograd.grad or `.backward(inputs=...)`, which
            would not reach the parameters; or if two blocks use the same tensor of an enclosing
            function that is not a leaf: pass it as an argument.
        torch.utils.checkpoint.CheckpointError: in the backward pass, if the second call returns
            other tensors than the first.
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
    reason="checkpoint_primal inside of a jvp inside of a compiled function: compile without "
    "fullgraph=True, or compile the block"
)
def _checkpointed(
    function: Callable[..., Any], args: Any, kwargs: Any, preserve_rng_state: bool
) -> Any:
    call = RepeatableCall(function, args, kwargs)
    if inside_jvp():
        return _inside_jvp(call, preserve_rng_state)
    return checkpoint(
        call, *call.take_tensors(), use_reentrant=False, preserve_rng_state=preserve_rng_state
    )


def _inside_jvp(call: RepeatableCall, preserve_rng_state: bool) -> Any:
    raise_unless_one_jvp(_NAME)
    tensors = call.take_tensors()
    first = _FirstCall(call, tensors, preserve_rng_state)
    before = versions(tensors)
    with torch.no_grad():
        leaves, spec = tree_flatten(call(*tensors))
    raise_if_modified(_NAME, tensors, before)

    places, duals = [], []
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor):
            no_hidden_tensors(_NAME, x)
        elif _may_require_grad(x):
            places.append(i)
            duals.append(unpacked(x))
    first.outputs = tuple(dual.primal for dual in duals)
    outputs = _Recomputed.apply(first, _ANCHOR + 0, *(unpacked(x).primal for x in tensors))
    for i, output, dual in zip(places, outputs, duals, strict=True):
        leaves[i] = output if dual.tangent is None else fwAD.make_dual(output, dual.tangent)
    return tree_unflatten(leaves, spec)


def _may_require_grad(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


class _FirstCall:
    """What the second call needs of the first, besides the tensors among its arguments."""

    outputs: tuple[Tensor, ...] = ()

    def __init__(
        self, call: RepeatableCall, tensors: list[Tensor], preserve_rng_state: bool
    ) -> None:
        self.call = call
        self.random = _RandomState(tensors) if preserve_rng_state else None
        self.autocast = [
            torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=torch.is_autocast_cache_enabled(),
            )
            for kind in {"cpu", *(x.device.type for x in tensors)} - {"meta"}
        ]

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        with ExitStack() as stack:
            for autocast in self.autocast:
                stack.enter_context(autocast)
            if self.random is not None:
                stack.enter_context(self.random.restored())
            yield


class _RandomState:
    """The random state of the CPU and of the devices of some tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.of_cpu = torch.get_rng_state()
        kinds = {x.device.type for x in tensors} - {"cpu", "meta"}
        self.of_devices = {
            kind: get_device_states(*(x for x in tensors if x.device.type == kind))
            for kind in kinds
        }

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for kind, (devices, states) in self.of_devices.items():
                stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
                set_device_states(devices, states, device_type=kind)
            torch.set_rng_state(self.of_cpu)
            yield


class _Recomputed(torch.autograd.Function):
    """(first call, anchor, *tensors among its arguments) -> its outputs, now with a graph."""

    @staticmethod
    def forward(first: _FirstCall, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Outside of the jvp, and without what autograd knows of views: an output may be modified in
        # place later.
        outputs, first.outputs = first.outputs, ()
        return tuple(innermost(x).detach() for x in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.first, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        _raise_unless_plain_backward()
        first = ctx.first
        inputs = [
            x.detach().requires_grad_(needs)
            for x, needs in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        first.call.prepare_sharded_modules()
        with torch.enable_grad(), first.surroundings():
            leaves = tree_leaves(first.call(*inputs))
        # A tensor of an enclosing function may come back as it was inside of the jvp.
        tensors = [without_ended_transforms(x) for x in leaves if isinstance(x, Tensor)]
        outputs = [x for x in tensors if _may_require_grad(x)]
        if len(outputs) != len(gradients):
            raise CheckpointError(
                f"the second call of the function of {_NAME} returned {len(outputs)} tensors, the "
                f"first returned {len(gradients)}"
            )
        # A clone, because it may become the .grad of a leaf, to which the next block adds in place.
        pairs = [
            (y, gradient.clone())
            for y, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and y.requires_grad
        ]
        # torch.autograd.grad would not run the hooks with which FSDP2 reduces gradients.
        torch.autograd.backward([y for y, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, *(x.grad for x in inputs)


def _raise_unless_plain_backward() -> None:
    if not torch.autograd._is_checkpoint_valid():
        raise RuntimeError(
            f"{_NAME} inside of a jvp needs .backward(); torch.autograd.grad and "
            ".backward(inputs=...) do not reach the parameters of the blocks. checkpoint_jvp works "
            "with both"
        )
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{_NAME} inside of a jvp has no gradient of its gradient: call .backward() without "
            "create_graph=True, or use checkpoint_jvp"
        )
    if inside_jvp():
        raise NotImplementedError(
            f"a backward pass through {_NAME} inside of a jvp or a dual level is not supported: "
            "call .backward() after it"
        )
