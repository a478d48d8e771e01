"""How backend `tiled` divides attention into blocks of rows, and which keys their rows see.

Query heads that share a key head are stacked as rows of one problem, so grouped heads need neither
copies of K and V nor a reduction of their gradients. Sequences whose lengths differ, packed or
padded, are separate blocks: padding is never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from jvp_attn.types import AttentionOptions, Causal, Inputs

X = TypeVar("X", Tensor, Tensor | None)  # an absent tensor stays absent

# Numbers in the largest matrix of a block, the scores unless head dims are large. On a CPU they
# should fit the cache; a GPU needs more parallel work.
_CPU_BLOCK = 2**19
_GPU_BLOCK = 2**24
# Matrix products with fewer rows than this are slow, however long the rows are.
_MIN_ROWS = 64


@dataclass(frozen=True)
class HeadBlock:
    """Some batches and key heads of equal seqlens: each (batch, key head) pair is one problem.

    Attributes:
        batches, key_heads: which.
        group: query heads per key head.
        queries, keys: the positions of the sequence.
        diagonal: query i of the sequence sees its keys j ≤ i + diagonal; None is all.
        mask: as in `Inputs`.
        mask_group: as in `AttentionOptions`.
        rows_per_block: how many rows of each query head a block of rows takes.
        device: where the tensors are.
    """

    batches: slice
    key_heads: slice
    group: int
    queries: slice
    keys: slice
    diagonal: int | None
    mask: Tensor | None
    mask_group: int
    rows_per_block: int
    device: torch.device

    @property
    def hides_keys(self) -> bool:
        """Whether there may be a row that does not see some key."""
        return self.diagonal is not None or self.mask is not None

    def load_keys(self, x: X) -> X:
        """(batch, seqlen_k, heads_k, dim) → (problems, keys, dim), at least float32."""
        if x is None:
            return None
        return self._keys_part(x).flatten(0, 1).to(_compute_dtype(x)).contiguous()

    def store_keys(self, target: Tensor | None, value: Tensor | None) -> None:
        """The inverse of `load_keys`."""
        if target is not None and value is not None:
            part = self._keys_part(target)
            part.copy_(value.view(part.shape))

    def mask_entries(self, mask_batch: int) -> slice | Tensor:
        """Which entries of a mask the batches have: one for all, or one for each."""
        group = self.mask_group
        first = self.batches.start // group
        if mask_batch == 1 or first == (self.batches.stop - 1) // group:
            return slice(first % mask_batch, first % mask_batch + 1)
        if group == 1 and self.batches.stop <= mask_batch:
            return self.batches
        batches = torch.arange(self.batches.start, self.batches.stop, device=self.device)
        return batches // group % mask_batch

    def row_blocks(self) -> Iterator[RowBlock]:
        """Blocks of rows, each with the number of leading keys that its last row sees."""
        seqlen_q, seqlen_k = _length(self.queries), _length(self.keys)
        # The first rows may see no key: their results keep their initial values.
        first = 0 if self.diagonal is None else max(-self.diagonal, 0)
        for start in range(first, seqlen_q, self.rows_per_block):
            stop = min(start + self.rows_per_block, seqlen_q)
            seen = seqlen_k if self.diagonal is None else min(stop + self.diagonal, seqlen_k)
            yield RowBlock(self, slice(start, stop), seen)

    def _keys_part(self, x: Tensor) -> Tensor:
        """(batch, seqlen_k, heads_k, dim) → view (batches, key heads, keys, dim)."""
        return x[self.batches, self.keys, self.key_heads].transpose(1, 2)


@dataclass(frozen=True)
class RowBlock:
    """Rows of one head block: the same rows of every query head that shares a key head.

    Attributes:
        heads: the head block.
        rows: their positions in the sequence.
        seen_keys: how many keys, from the first, are seen by any of them.
    """

    heads: HeadBlock
    rows: slice
    seen_keys: int

    def seen(self, keys: X) -> X:
        """Of (problems, keys, dim), those that are seen."""
        return None if keys is None else keys[:, : self.seen_keys]

    def load(self, x: X) -> X:
        """(batch, seqlen_q, heads, dim) → (problems, group · rows, dim), at least float32."""
        if x is None:
            return None
        x = self._part(x)
        return x.flatten(2, 3).flatten(0, 1).to(_compute_dtype(x))

    def store(self, target: Tensor | None, value: Tensor | None) -> None:
        """The inverse of `load`."""
        if target is not None and value is not None:
            part = self._part(target)
            part.copy_(value.view(part.shape))

    def load_sums(self, x: X) -> X:
        """(batch, heads, seqlen_q) → (problems, group · rows, 1)."""
        if x is None:
            return None
        part = self._sums_part(x)
        return part.reshape(-1, part.shape[2] * part.shape[3], 1)

    def store_sums(self, target: Tensor | None, value: Tensor) -> None:
        """The inverse of `load_sums`."""
        if target is None:
            return
        part = self._sums_part(target)
        part.copy_(value.view(part.shape))

    def add_products(
        self, total: Tensor | None, *pairs: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Add aᵀ b, for pairs that have both, to the seen keys of (problems, keys, dim)."""
        if total is None:
            return
        for a, b in pairs:
            if a is not None and b is not None:
                self.seen(total).baddbmm_(a.mT, b)

    # ------------------------------------------------------------------------
    # What the rows see. Scores are (problems, group · rows, seen keys)

    def hide(self, scores: X, value: float) -> X:
        """Fill the scores of keys that a row does not see, in place."""
        if scores is not None and self._hidden is not None:
            self._of_heads(scores).masked_fill_(self._hidden, value)
        return scores

    def add_mask(self, scores: X, mask: Tensor | None) -> X:
        """Add a floating mask, or its tangent, to scores, in place; scores of None are zeros."""
        if mask is None or mask.dtype == torch.bool:
            return scores
        part = self._mask_of_batches(mask)
        if scores is None:
            shape = (*self._problem_shape, self.seen_keys)
            total = torch.empty(shape, dtype=_compute_dtype(part), device=part.device)
            return total.copy_(part).flatten(2, 3).flatten(0, 1)
        self._of_heads(scores).add_(part)
        return scores

    def add_scores(self, mask: Tensor | None, scores: Tensor | None) -> None:
        """Add scores to a tensor of the mask's shape, summed over broadcast dimensions."""
        if mask is None or scores is None:
            return
        part = self._mask_part(mask)
        scores = self._of_heads(scores)
        if isinstance(entries := self.heads.mask_entries(mask.shape[0]), slice):
            part = part[entries]
            part.add_(scores.sum_to_size(part.shape))
        else:
            sums = scores.sum_to_size(len(entries), *part.shape[1:])
            # The order of these sums is fixed; that of index_add_ on a GPU, and that of index_put_
            # on a CPU, is not.
            if part.is_cuda:
                part.index_put_((entries,), sums, accumulate=True)
            else:
                part.index_add_(0, entries, sums)

    def count_seen(self, marked: Tensor) -> Tensor:
        """How many of the marked keys, (problems, keys, 1) of zeros and ones, each row sees."""
        keys = self.seen(marked)
        rows = self.heads.group * _length(self.rows)
        sees = self.hide(keys.new_ones(keys.shape[0], rows, self.seen_keys), 0)
        return sees @ keys

    @cached_property
    def _hidden(self) -> Tensor | None:
        """Broadcastable to (batches, key heads, group, rows, seen keys); None if all are seen."""
        hidden = self._hidden_by_causal()
        mask = self.heads.mask
        if mask is None:
            return hidden
        part = self._mask_of_batches(mask)
        by_mask = ~part if mask.dtype == torch.bool else part == -torch.inf
        return by_mask if hidden is None else by_mask | hidden

    def _hidden_by_causal(self) -> Tensor | None:
        diagonal = self.heads.diagonal
        if diagonal is None or self.rows.start + diagonal + 1 >= self.seen_keys:
            return None  # the first row already sees every key of the block
        row = torch.arange(self.rows.start, self.rows.stop, device=self.heads.device)
        column = torch.arange(self.seen_keys, device=self.heads.device)
        return column > (row + diagonal)[:, None]

    def _mask_of_batches(self, mask: Tensor) -> Tensor:
        """(batches, key heads, group, rows, seen keys), each of them 1 where it is broadcast."""
        return self._mask_part(mask)[self.heads.mask_entries(mask.shape[0])]

    def _mask_part(self, mask: Tensor) -> Tensor:
        """View (mask_batch, key heads, group, rows, seen keys), those 1 that are 1 in mask."""
        _, heads, rows, keys = mask.shape
        mask = mask.unflatten(1, (1, 1) if heads == 1 else (-1, self.heads.group))
        if heads != 1:
            mask = mask[:, self.heads.key_heads]
        if rows != 1:
            mask = mask[:, :, :, self.rows]
        return mask[..., : self.seen_keys] if keys != 1 else mask

    # ------------------------------------------------------------------------

    @property
    def _problem_shape(self) -> tuple[int, int, int, int]:
        heads = self.heads
        return (
            _length(heads.batches),
            _length(heads.key_heads),
            heads.group,
            _length(self.rows),
        )

    def _of_heads(self, scores: Tensor) -> Tensor:
        """(problems, group · rows, seen keys) → (batches, key heads, group, rows, seen keys)."""
        return scores.view(*self._problem_shape, self.seen_keys)

    def _part(self, x: Tensor) -> Tensor:
        """(batch, seqlen_q, heads, dim) → view (batches, key heads, group, rows, dim)."""
        x = x.unflatten(2, (-1, self.heads.group))
        return x[self.heads.batches, self._positions, self.heads.key_heads].permute(0, 2, 3, 1, 4)

    def _sums_part(self, x: Tensor) -> Tensor:
        """(batch, heads, seqlen_q) → view (batches, key heads, group, rows)."""
        x = x.unflatten(1, (-1, self.heads.group))
        return x[self.heads.batches, self.heads.key_heads, :, self._positions]

    @property
    def _positions(self) -> slice:
        start = self.heads.queries.start
        return slice(start + self.rows.start, start + self.rows.stop)


def head_blocks(inputs: Inputs, options: AttentionOptions) -> Iterator[HeadBlock]:
    """Divide attention so that each block of scores has about the best size for the device."""
    heads, heads_k = inputs.q.shape[2], inputs.k.shape[2]
    group = heads // max(heads_k, 1)
    head_dim = max(inputs.q.shape[3], inputs.v.shape[3])
    budget = _CPU_BLOCK if inputs.q.device.type == "cpu" else _GPU_BLOCK
    for batches, queries, keys in _sequences(inputs):
        seqlen_q, seqlen_k = _length(queries), _length(keys)
        if 0 in (_length(batches), seqlen_q, seqlen_k, heads):
            continue
        rows_of_group = max(budget // max(seqlen_k, head_dim), _MIN_ROWS)
        rows_per_block = min(max(rows_of_group // group, 1), seqlen_q)
        rows = group * rows_per_block
        largest_matrix = max(rows * seqlen_k, rows * head_dim, seqlen_k * head_dim)
        problems = max(budget // largest_matrix, 1)
        # Several batches if one batch fits, else some of the heads of one batch.
        heads_per_block = min(problems, heads_k)
        batches_per_block = max(problems // heads_k, 1)
        for b in range(batches.start, batches.stop, batches_per_block):
            for h in range(0, heads_k, heads_per_block):
                yield HeadBlock(
                    slice(b, min(b + batches_per_block, batches.stop)),
                    slice(h, min(h + heads_per_block, heads_k)),
                    group,
                    queries,
                    keys,
                    _diagonal(options.causal, seqlen_q, seqlen_k),
                    inputs.mask,
                    options.mask_group,
                    rows_per_block,
                    inputs.q.device,
                )


def _sequences(inputs: Inputs) -> Iterator[tuple[slice, slice, slice]]:
    """(batches, queries, keys): the positions of sequences whose lengths are the same."""
    batch, seqlen_q, seqlen_k = *inputs.q.shape[:2], inputs.k.shape[1]
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        ranges = (pairwise(ends.tolist()) for ends in (inputs.cu_seqlens_q, inputs.cu_seqlens_k))
        for queries, keys in zip(*ranges, strict=True):
            yield slice(0, 1), slice(*queries), slice(*keys)
    elif inputs.seqused_k is not None:
        stop = 0
        for used, examples in groupby(inputs.seqused_k.tolist()):
            start, stop = stop, stop + len(list(examples))
            yield slice(start, stop), slice(0, seqlen_q), slice(0, used)
    else:
        yield slice(0, batch), slice(0, seqlen_q), slice(0, seqlen_k)


def _diagonal(causal: Causal, seqlen_q: int, seqlen_k: int) -> int | None:
    match causal:
        case Causal.NO:
            return None
        case Causal.BOTTOM_RIGHT:
            return seqlen_k - seqlen_q
        case Causal.TOP_LEFT:
            return 0


def _length(places: slice) -> int:
    return places.stop - places.start


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
