"""How a sequence of tokens is divided among the ranks that share it.

A sequence is padded at its end and cut into equal shares, one per rank:

    total = 7, 3 ranks, share = 3:    0 1 2 | 3 4 5 | 6 · ·

The length of a share determines the length of the whole sequence. A block of a network that is
computed again in a backward pass therefore knows from its arguments alone which tokens are padding,
whatever other calls of the network came between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor


class TokenSplit:
    """The division of all sequences of one network.

    Sequences of different lengths have shares of different lengths: a length that comes later gets
    the shortest share that is still free. Each further length that would have the same share costs
    one more padded token per rank.
    """

    def __init__(self, ranks: int, rank: int) -> None:
        self.ranks, self.rank = ranks, rank
        self._shares: dict[int, int] = {}
        self._totals: dict[int, int] = {}

    def share(self, total: int) -> int:
        """The number of tokens of each rank, with padding, of a sequence of `total` tokens."""
        if total not in self._shares:
            share = -(-total // self.ranks)
            while share in self._totals:
                share += 1
            self._shares[total], self._totals[share] = share, total
        return self._shares[total]

    def total(self, share: int) -> int:
        """The length of the sequence of which a rank has `share` tokens.

        Raises RuntimeError if no sequence was cut into such shares.
        """
        if share not in self._totals:
            raise RuntimeError(
                f"a sequence has {share} tokens on this rank, but no sequence was split into such "
                "shares: the token plan of the network must split all of its inputs with tokens"
            )
        return self._totals[share]

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of a whole sequence along `dim`, padded with zeros."""
        total = x.shape[dim]
        share = self.share(total)
        start, end = (min(r * share, total) for r in (self.rank, self.rank + 1))
        padding = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, share - (end - start)]
        return F.pad(x.narrow(dim, start, end - start), padding)

    def tokens(self, shares: Sequence[int], ranks: Iterable[int]) -> list[slice]:
        """Where the tokens are, without the padding, in the joined shares of several ranks.

        Each rank has one share of each of several sequences, one after the other. The slices are in
        order and disjoint; there is at least one, which may be empty.
        """
        found = [slice(0, 0)]
        start = 0
        for rank in ranks:
            for share in shares:
                count = min(max(self.total(share) - rank * share, 0), share)
                if found[-1].stop == start:
                    found[-1] = slice(found[-1].start, start + count)
                elif count:
                    found.append(slice(start, start + count))
                start += share
        return found
