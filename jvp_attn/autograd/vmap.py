"""The vmap rule of the attention Functions: the mapped dimension becomes part of the batch.

Tensors that are not mapped, such as the primals under `jacfwd`, are shared by strides of 0 and
never copied. If they have a batch of their own, no stride can share them; then the rule loops over
the shorter of the two dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jvp_attn.autograd.signatures import Signature
from jvp_attn.types import Gradients, Inputs, Tangents, split_needs

Results = tuple[Tensor | None, ...]


def vmap_attention(
    function: Callable[..., Results],
    signature: Signature,
    size: int,
    in_dims: tuple[int | None, ...],
    arguments: tuple[Any, ...],
) -> tuple[Results, tuple[int | None, ...]]:
    """Map a Function over a dimension.

    Args:
        function: applies it.
        signature: of its primitive. All tensors but cu_seqlens have a batch in front; that of the
            mask and its tangent may be 1, to be broadcast.
        size, in_dims, arguments: as torch passes them to a vmap rule.

    Returns:
        The results, and for each the place of the mapped dimension.

    Raises:
        ValueError: cu_seqlens are mapped.
    """
    cu_seqlens = _positions(signature, (Inputs, "cu_seqlens_q"), (Inputs, "cu_seqlens_k"))
    masks = _positions(signature, (Inputs, "mask"), (Tangents, "mask"))
    (q,) = _positions(signature, (Inputs, "q"))
    if any(in_dims[i] is not None for i in cu_seqlens):
        raise ValueError(
            "vmap over cu_seqlens_q or cu_seqlens_k is not supported: pack the sequences of all "
            "examples into one call"
        )
    if size == 0:
        # The results have the shapes of one example. Sums over no examples keep derivatives.
        example = (
            x.sum(dim, dtype=x.dtype) if isinstance(x, Tensor) and dim is not None else x
            for x, dim in zip(arguments, in_dims, strict=True)
        )
        results = [None if y is None else y[None][:0] for y in function(*example)]
        return _mapped(results)
    packed = any(arguments[i] is not None for i in cu_seqlens)
    mask_gradients = _needs_mask_gradients(signature, arguments)
    shared, mapped = {}, {}
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor) and i not in cu_seqlens:
            if (dim := in_dims[i]) is None:
                shared[i] = x
            else:
                mapped[i] = x.movedim(dim, 0)
    batch = mapped[q].shape[1] if q in mapped else shared[q].shape[0]

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
        results = [_stack(ys, 0) for ys in zip(*each, strict=True)]
    else:
        parts = []
        for b in range(batch):
            mapped_b = {i: x[:, min(b, x.shape[1] - 1), None] for i, x in mapped.items()}
            shared_b = {i: x[min(b, x.shape[0] - 1), None] for i, x in shared.items()}
            parts.append(call_folded(mapped_b, shared_b))
        results = [
            None if y is None else y.flatten(1, 2)
            for y in (_stack(ys, 1) for ys in zip(*parts, strict=True))
        ]
    return _mapped(results)


def _mapped(results: Sequence[Tensor | None]) -> tuple[Results, tuple[int | None, ...]]:
    """The results of a vmap rule whose mapped dimension comes first."""
    return tuple(results), tuple(None if y is None else 0 for y in results)


def _positions(signature: Signature, *fields: tuple[type, str]) -> tuple[int, ...]:
    """Where those of the fields that the primitive takes are among its arguments."""
    positions = (signature.position(group, name) for group, name in fields)
    return tuple(i for i in positions if i is not None)


def _needs_mask_gradients(signature: Signature, arguments: tuple[Any, ...]) -> bool:
    """Whether there are results of the mask's shape."""
    if signature.results[0] is not Gradients:
        return False
    *_, needs, _options = arguments
    return any(x.mask for x in split_needs(needs))


def _stack(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    tensors = [x for x in parts if x is not None]
    return torch.stack(tensors, dim) if tensors else None
