"""The vmap rule of the attention Functions: the mapped dimension becomes part of the batch.

Tensors that are not mapped, such as the primals under `jacfwd`, are shared by strides of 0 and
never copied. If they have a batch of their own, no stride can share them; then the rule loops over
the shorter of the two dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jvp_attn.autograd.signatures import Signature
from jvp_attn.types import AttentionOptions, Gradients, Inputs, Tangents, split_needs

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
        signature: of its primitive. All tensors but cu_seqlens have a batch in front; those of the
            mask and its tangent may be smaller, see `AttentionOptions.mask_group`.
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
    options: AttentionOptions = arguments[-1]
    shared, mapped = {}, {}
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor) and i not in cu_seqlens:
            if (dim := in_dims[i]) is None:
                shared[i] = x
            else:
                mapped[i] = x.movedim(dim, 0)
    batch = mapped[q].shape[1] if q in mapped else shared[q].shape[0]
    if mask_gradients:  # each of a shared mask's copies has a gradient of its own
        for i in masks & shared.keys():
            mapped[i] = shared.pop(i).expand(size, *arguments[i].shape)

    def call(changed: dict[int, Tensor], mask_group: int = options.mask_group) -> Results:
        *others, _ = (changed.get(i, x) for i, x in enumerate(arguments))
        return function(*others, replace(options, mask_group=mask_group))

    def call_folded(
        mapped: dict[int, Tensor], shared: dict[int, Tensor], mask_group: int
    ) -> list[Tensor | None]:
        """From mapped (size, batch, ...) and shared (1, ...) to (size, batch, ...)."""
        folded = {i: x.flatten(0, 1) for i, x in mapped.items()}
        for i, x in shared.items():
            folded[i] = x if i in masks else x.expand(size, *x.shape[1:])
        results = call(folded, mask_group)
        return [None if y is None else y.unflatten(0, (size, y.shape[0] // size)) for y in results]

    def at(b: int, i: int, n: int) -> int:
        """What the example b has, of the n entries of argument i."""
        return b // options.mask_group % n if i in masks else b

    mask_group = _folded_mask_group(
        {x.shape[1] for i, x in mapped.items() if i in masks},
        {x.shape[0] for i, x in shared.items() if i in masks},
        batch,
        options.mask_group,
    )
    if not packed and mask_group is not None and (batch == 1 or shared.keys() <= masks):
        results = call_folded(mapped, shared, mask_group)
    elif packed or mask_gradients or size <= batch or batch == 0:
        each = [call({i: x[n] for i, x in mapped.items()}) for n in range(size)]
        results = [_stack(ys, 0) for ys in zip(*each, strict=True)]
    else:
        parts = []
        for b in range(batch):
            mapped_b = {i: x[:, at(b, i, x.shape[1]), None] for i, x in mapped.items()}
            shared_b = {i: x[at(b, i, x.shape[0]), None] for i, x in shared.items()}
            parts.append(call_folded(mapped_b, shared_b, mask_group=1))
        results = [
            None if y is None else y.flatten(1, 2)
            for y in (_stack(ys, 1) for ys in zip(*parts, strict=True))
        ]
    return _mapped(results)


def _mapped(results: Sequence[Tensor | None]) -> tuple[Results, tuple[int | None, ...]]:
    """The results of a vmap rule whose mapped dimension comes first."""
    return tuple(results), tuple(None if y is None else 0 for y in results)


def _folded_mask_group(mapped: set[int], shared: set[int], batch: int, group: int) -> int | None:
    """The mask_group after the mapped dimension became part of the batch; None if there is none.

    Args:
        mapped, shared: the batch sizes of the masks that are mapped, and of those that are not.
        batch: that of q, before.
        group: mask_group, before.
    """
    if all(size * group == batch for size in mapped):
        return group
    return max(batch, 1) if mapped | shared == {1} else None


def _positions(signature: Signature, *fields: tuple[type, str]) -> frozenset[int]:
    """Where those of the fields that the primitive takes are among its arguments."""
    positions = (signature.position(group, name) for group, name in fields)
    return frozenset(i for i in positions if i is not None)


def _needs_mask_gradients(signature: Signature, arguments: tuple[Any, ...]) -> bool:
    """Whether there are results of the mask's shape."""
    if signature.results[0] is not Gradients:
        return False
    *_, needs, _options = arguments
    return any(x.mask for x in split_needs(needs))


def _stack(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    tensors = [x for x in parts if x is not None]
    return torch.stack(tensors, dim) if tensors else None
