"""The vmap rule of the attention Functions: a new dimension becomes part of the batch.

Tensors that the new dimension does not run over, such as the primals under `jacfwd`, are shared by
strides of 0 and never copied. Where they have a batch of their own, which leaves no stride to share
them by, the shorter of the two dimensions is walked through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Places in the arguments of every Function, which begin as `jvp_attn.types.Inputs`.
_Q, _CU_SEQLENS = 0, (4, 5)

Results = tuple[Tensor | None, ...]


def vmap_attention(
    function: Callable[..., Results],
    size: int,
    in_dims: tuple[int | None, ...],
    arguments: tuple[Any, ...],
    masks: tuple[int, ...],
    mask_gradients: bool,
) -> tuple[Results, tuple[int | None, ...]]:
    """Map a Function over a dimension.

    Args:
        function: applies it.
        size, in_dims, arguments: as torch gives them to a vmap rule. All tensors but cu_seqlens
            have a batch in front.
        masks: places of the mask and its tangent; their batch may be 1, to be broadcast.
        mask_gradients: whether there are results of the mask's shape.

    Returns:
        The results, and for each the place of the dimension.

    Raises:
        ValueError: the dimension runs over cu_seqlens.
    """
    if any(in_dims[i] is not None for i in _CU_SEQLENS):
        raise ValueError(
            "vmap over cu_seqlens_q or cu_seqlens_k is not supported: pack the sequences of all "
            "examples into one call"
        )
    packed = arguments[_CU_SEQLENS[0]] is not None
    shared, mapped = {}, {}
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor) and i not in _CU_SEQLENS:
            if (dim := in_dims[i]) is None:
                shared[i] = x
            else:
                mapped[i] = x.movedim(dim, 0)
    batch = mapped[_Q].shape[1] if _Q in mapped else shared[_Q].shape[0]

    def broadcasts(i: int) -> bool:
        return i in shared and i in masks and shared[i].shape[0] == 1 and not mask_gradients

    def call(changed: dict[int, Tensor]) -> Results:
        return function(*(changed.get(i, x) for i, x in enumerate(arguments)))

    def call_folded(mapped: dict[int, Tensor], shared: dict[int, Tensor]) -> list[Tensor | None]:
        """From mapped (size, batch, ...) and shared (1, ...) to (size, batch, ...)."""
        folded = {i: x.flatten(0, 1) for i, x in mapped.items()}
        for i, x in shared.items():
            folded[i] = x if broadcasts(i) else x.expand(size, *x.shape[1:])
        results = call(folded)
        return [None if y is None else y.unflatten(0, (size, y.shape[0] // size)) for y in results]

    if not packed and (
        batch == 1
        or (all(map(broadcasts, shared)) and all(x.shape[1] == batch for x in mapped.values()))
    ):
        results = call_folded(mapped, shared)
    elif packed or mask_gradients or size <= batch or batch == 0:
        each = [call({i: x[n] for i, x in mapped.items()}) for n in range(size)]
        results = [_stacked(ys, 0) for ys in zip(*each, strict=True)]
    else:
        parts = []
        for b in range(batch):
            of_mapped = {i: x[:, min(b, x.shape[1] - 1), None] for i, x in mapped.items()}
            of_shared = {i: x[min(b, x.shape[0] - 1), None] for i, x in shared.items()}
            parts.append(call_folded(of_mapped, of_shared))
        results = [
            None if y is None else y.flatten(1, 2)
            for y in (_stacked(ys, 1) for ys in zip(*parts, strict=True))
        ]
    return tuple(results), tuple(None if y is None else 0 for y in results)


def _stacked(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    tensors = [x for x in parts if x is not None]
    return torch.stack(tensors, dim) if tensors else None
