"""JVPs of normalisations that are fast and have the right gradient.

The JVP of PyTorch's layer_norm, batch_norm and instance_norm is exact, but the gradient through it
is silently wrong: it takes the saved mean and standard deviation for constants (seen in torch 2.13;
pytorch/pytorch#196700 and #196699). rms_norm and group_norm are right. That of rms_norm takes many
small operations. With r = 1 / sqrt(mean(c²) + eps) and n = r c,

    layer_norm, c = x - mean(x):    tn = r (tx - mean(tx) - n mean(n tx))
    rms_norm, c = x:                tn = r (tx - n mean(n tx))
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from rcm.dual_numbers import (
    depth,
    is_plain,
    is_recorded_inside,
    joined,
    of_tangents,
    split,
)

Shape = tuple[int, ...] | list[int]


def layer_norm(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.layer_norm with a JVP that has the right gradient."""
    arguments = (input, normalized_shape, weight, bias, eps)
    if not torch.compiler.is_compiling() and has_torch_function_unary(input):
        return handle_torch_function(layer_norm, (input,), *arguments)
    return layer_norm_rule(*arguments)


def layer_norm_rule(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    detached: bool = False,
) -> Tensor:
    """layer_norm; detached says that the caller needs no gradient through the tangent."""
    x, tangent = split(input)
    # PyTorch's own rule for the primal would take its statistics for constants in an outer jvp.
    if depth() > 1 or is_recorded_inside(input, weight, bias):
        return _from_operations(input, normalized_shape, weight, bias, eps)
    if tangent is None or not (is_fixed(weight) and is_fixed(bias)):
        if torch.is_grad_enabled() and not detached and depth():
            return _from_operations(input, normalized_shape, weight, bias, eps)
        return nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
    wide = _statistics_dtype(x)
    if _autocast_is_wide(x):
        x, tangent = x.to(wide), tangent.to(wide)
    y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    with of_tangents(detached=detached):
        if not torch.is_grad_enabled():
            # The Jacobian is symmetric, so that the VJP, a single operation, is the JVP. Its third
            # derivatives would take the statistics for constants.
            if x.dtype != wide and not x.is_cuda:  # the statistics may have the dtype of weights
                x, tangent = x.to(wide), tangent.to(wide)
                _, mean, rstd = torch.native_layer_norm(x, normalized_shape, None, None, eps)
            tn, *_ = torch.ops.aten.native_layer_norm_backward(
                tangent, x, normalized_shape, mean, rstd, None, None, [True, False, False]
            )
        else:
            dims = tuple(range(-len(normalized_shape), 0))
            x, tangent = x.to(wide), tangent.to(wide)
            variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
            r = torch.rsqrt(variance + eps)
            tn = _tangent((x - mean) * r, tangent - tangent.mean(dims, keepdim=True), r, dims)
        tn = tn if weight is None else tn * weight
    return joined(y, tn)


def rms_norm_rule(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    detached: bool = False,
) -> Tensor:
    """rms_norm; detached says that the caller needs no gradient through the tangent."""
    x, tangent = split(input)
    recorded = is_recorded_inside(input, weight)
    if tangent is None or eps is None or recorded or not is_fixed(weight):
        return nn.functional.rms_norm(input, list(normalized_shape), weight, eps)
    y = nn.functional.rms_norm(x, list(normalized_shape), weight, eps)
    with of_tangents(detached=detached):
        dims = tuple(range(-len(normalized_shape), 0))
        wide = _statistics_dtype(x)
        x, tangent = x.to(wide), tangent.to(wide)
        r = torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
        tn = _tangent(x * r, tangent, r, dims)
        tn = tn if weight is None else tn * weight
    return joined(y, tn)


def raise_for_wrong_gradient(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError if the gradient through the JVP of function(...) is wrong."""
    if function is torch.native_layer_norm:
        raise NotImplementedError(
            "the gradient through the JVP of torch.native_layer_norm is wrong in PyTorch: use "
            "torch.nn.functional.layer_norm"
        )
    argument, default = BATCH_STATISTICS[function]
    given = args[STATISTICS_PLACE] if len(args) > STATISTICS_PLACE else default
    if kwargs.get(argument, given):
        raise NotImplementedError(
            f"the gradient through the JVP of {function.__name__} with {argument}=True is wrong in "
            "PyTorch: use central_difference(h) or another normalisation"
        )


# Functions that normalise by batch statistics if this argument is True, and its default. It is the
# sixth of each.
BATCH_STATISTICS: dict[Any, tuple[str, bool]] = {
    nn.functional.batch_norm: ("training", False),
    nn.functional.instance_norm: ("use_input_stats", True),
    torch.batch_norm: ("training", False),
    torch.instance_norm: ("use_input_stats", True),
}
STATISTICS_PLACE = 5
WRONG_GRADIENT = {*BATCH_STATISTICS, torch.native_layer_norm}


def _tangent(n: Tensor, tangent: Tensor, r: Tensor, dims: tuple[int, ...]) -> Tensor:
    """r (tx - n mean(n tx))."""
    return torch.addcmul(tangent, n, (n * tangent).mean(dims, keepdim=True), value=-1) * r


def _from_operations(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """layer_norm as rms_norm(x - mean), with statistics in float32 or better.

    It has every derivative under every transform, and takes many small operations.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.to(_statistics_dtype(input))
    centred = wide - wide.mean(dims, keepdim=True)
    y = nn.functional.rms_norm(centred, list(normalized_shape), eps=eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if _autocast_is_wide(input) else y.to(input.dtype)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _autocast_is_wide(x: Tensor) -> bool:
    """CUDA's autocast computes layer_norm in float32 and leaves the result there."""
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def is_fixed(weight: Tensor | None) -> bool:
    """Whether a weight has no tangent in the innermost jvp."""
    if weight is None:
        return True
    return is_plain(weight) and not weight.is_complex() and split(weight)[1] is None
