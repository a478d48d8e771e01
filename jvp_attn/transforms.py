"""What checkpoints need to know of the surrounding transforms, and of tensors inside of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.autograd.forward_ad import UnpackedDualTensor


def depth() -> int:
    """The number of active transforms of torch.func."""
    return len(torch._C._functorch.get_interpreter_stack() or ())


def inside_jvp() -> bool:
    """Whether a transform of torch.func or a dual level is active."""
    return depth() > 0 or fwAD._current_level >= 0


def raise_unless_one_jvp(name: str, allowed: int = 1) -> None:
    """Raise NotImplementedError unless the transforms are at most `allowed` jvps, or torch is old.

    name: the function that needs it, for the message.
    """
    transforms = torch._C._functorch.get_interpreter_stack() or []
    is_jvp = [t.key() == torch._C._functorch.TransformType.Jvp for t in transforms]
    if not all(is_jvp) or len(transforms) > allowed:
        active = ", ".join(t.key().name.lower() for t in transforms)
        raise NotImplementedError(
            f"with grad enabled, {name} works inside of one torch.func.jvp and no other "
            f"transform of torch.func, got (outermost first) {active}: compute gradients with "
            ".backward() or torch.autograd.grad after the jvp, or call the function directly"
        )
    if torch.__version__ < "2.13":
        raise NotImplementedError(
            f"{name} inside of a jvp needs torch 2.13 or newer, got {torch.__version__}: "
            "upgrade torch, or put torch.utils.checkpoint around the jvp"
        )


def unpacked(x: Tensor) -> UnpackedDualTensor:
    """Primal and tangent at the current level; the tangent is None if there is none."""
    if x.is_floating_point() or x.is_complex():
        dual = fwAD.unpack_dual(x)
        return dual if dual.tangent is not None else UnpackedDualTensor(x, None)
    return UnpackedDualTensor(x, None)


def innermost(x: Tensor) -> Tensor:
    """The tensor inside of all wrappers of transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def without_ended_transforms(x: Tensor) -> Tensor:
    """The tensor inside of the wrappers of transforms that have ended."""
    while (inner := torch._C._functorch.unwrap_if_dead(x)) is not x:
        x = inner
    return x


def versions(tensors: list[Tensor]) -> list[int]:
    """How often each was modified in place; tensors of inference mode do not count it."""
    return [0 if x.is_inference() else x._version for x in tensors]


def raise_if_modified(name: str, tensors: list[Tensor], before: list[int]) -> None:
    """Raise NotImplementedError if a tensor has another version than before."""
    for i, (old, new) in enumerate(zip(before, versions(tensors), strict=True)):
        if old != new:
            raise NotImplementedError(
                f"inside of a jvp, the function of {name} must not modify its arguments in place, "
                f"but it modified tensor {i} of them, of shape {tuple(tensors[i].shape)}: let it "
                "modify a clone"
            )


def no_hidden_tensors(name: str, x: Any) -> Any:
    """A value in the results that is no tensor. Raises TypeError if it may hold tensors."""
    if x is None or isinstance(x, bool | int | float | complex | str | torch.dtype | torch.device):
        return x
    raise TypeError(
        f"the function of {name} returned an object of type {type(x).__name__}, whose tensors "
        "would lose their tangents: return tensors in tuples, lists and dicts, or register the "
        "type with torch.utils._pytree"
    )
