"""Sequences are divided into equal shares, of which the padding is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rcm.distributed.token_split import TokenSplit

LENGTHS = [45, 46, 7, 1, 0, 44, 8]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_share_determines_the_length_of_the_sequence(ranks: int) -> None:
    split = TokenSplit(ranks, 0)
    shares = {split.share(n): n for n in LENGTHS}
    assert len(shares) == len(LENGTHS)
    assert all(share * ranks >= n for share, n in shares.items())
    assert [split.total(share) for share in shares] == LENGTHS
    assert [split.share(n) for n in LENGTHS] == list(shares)  # the same again


def test_a_share_is_the_shortest_that_fits() -> None:
    split = TokenSplit(4, 0)
    assert [split.share(n) for n in (45, 7, 1)] == [12, 2, 1]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_joined_shares_without_padding_are_the_sequence(ranks: int, dim: int) -> None:
    lengths = (7, 1, 4)
    wholes = [torch.rand(5, 5).narrow(dim, 0, 1).repeat_interleave(n, dim) for n in lengths]
    wholes = [whole + torch.rand_like(whole) for whole in wholes]
    splits = [TokenSplit(ranks, rank) for rank in range(ranks)]
    owns = [[split.own(whole, dim) for whole in wholes] for split in splits]
    shares = [x.shape[dim] for x in owns[0]]
    joined = torch.cat([x for of_rank in owns for x in of_rank], dim).movedim(dim, 0)
    tokens = splits[0].tokens(shares, range(ranks))
    kept = torch.cat([joined[part] for part in tokens])
    in_order_of_ranks = [
        whole.movedim(dim, 0)[rank * share : (rank + 1) * share]
        for rank in range(ranks)
        for whole, share in zip(wholes, shares, strict=True)
    ]
    assert torch.equal(kept, torch.cat(in_order_of_ranks))
    assert all(a.stop < b.start for a, b in pairwise(tokens))


def test_padding_is_zero_and_has_no_gradient() -> None:
    whole = torch.rand(1, 3, requires_grad=True)
    own = TokenSplit(2, 1).own(whole, 1)
    assert own.tolist() == [[whole[0, 2].item(), 0.0]]
    own.sum().backward()
    assert whole.grad is not None
    assert whole.grad.tolist() == [[0.0, 0.0, 1.0]]


def test_ranks_without_tokens_have_an_empty_slice() -> None:
    split = TokenSplit(2, 0)
    assert split.tokens([split.share(1)], [1]) == [slice(0, 0)]


def test_unknown_shares_raise() -> None:
    with pytest.raises(RuntimeError, match="has 3 tokens on this rank, but no sequence was split"):
        TokenSplit(2, 0).total(3)
