"""Makes a random problem of the fuzzer invalid in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from tests.jvp_attn.fuzz_problems import Problem

Change = Callable[[dict[str, Tensor], Random], None]


def another_dtype(x: dict[str, Tensor], rng: Random) -> None:
    name = rng.choice(["q", "k", "v"])
    others = {torch.float16, torch.bfloat16, torch.float32, torch.float64} - {x[name].dtype}
    x[name] = x[name].to(rng.choice(sorted(others, key=str)))


def an_integer_dtype(x: dict[str, Tensor], rng: Random) -> None:
    for name in ("q", "k", "v"):
        x[name] = x[name].nan_to_num(0).clamp(-9, 9).to(torch.int64)


def another_head_dim(x: dict[str, Tensor], rng: Random) -> None:
    name = rng.choice(["q", "k"])
    x[name] = torch.cat([x[name], x[name].new_zeros(*x[name].shape[:-1], 1)], -1)


def more_values_than_keys(x: dict[str, Tensor], rng: Random) -> None:
    v = x["v"]
    x["v"] = torch.cat([v, v.new_zeros(len(v), 1, *v.shape[2:])], 1)


def another_rank(x: dict[str, Tensor], rng: Random) -> None:
    name = rng.choice(["q", "k", "v"])
    x[name] = x[name][0] if len(x[name]) and rng.random() < 0.5 else x[name][None]


def a_sparse_tensor(x: dict[str, Tensor], rng: Random) -> None:
    name = rng.choice(["q", "k", "v"])
    x[name] = x[name].contiguous().to_sparse()


def a_mask_of_another_shape(x: dict[str, Tensor], rng: Random) -> None:
    sizes = [1, 1, x["q"].shape[1] + 2, x["k"].shape[1] + 3]
    x["attn_mask"] = torch.ones(sizes, dtype=torch.bool)


def a_mask_of_integers(x: dict[str, Tensor], rng: Random) -> None:
    x["attn_mask"] = torch.ones((1, 1, 1, x["k"].shape[1]), dtype=torch.int64)


def too_many_used_keys(x: dict[str, Tensor], rng: Random) -> None:
    x["seqused_k"] = torch.full((len(x["q"]),), x["k"].shape[1] + 1, dtype=torch.int32)


def used_keys_of_another_batch(x: dict[str, Tensor], rng: Random) -> None:
    x["seqused_k"] = torch.ones(len(x["q"]) + 1, dtype=torch.int32)


def decreasing_cu_seqlens(x: dict[str, Tensor], rng: Random) -> None:
    name = rng.choice(["cu_seqlens_q", "cu_seqlens_k"])
    x[name] = x[name] - torch.arange(len(x[name]), dtype=torch.int32) * 1000 - 1


def cu_seqlens_beyond_the_end(x: dict[str, Tensor], rng: Random) -> None:
    x["cu_seqlens_k"] = x["cu_seqlens_k"] + len(x["k"]) + 1


GENERAL: list[Change] = [another_dtype, an_integer_dtype, another_head_dim]
DENSE: list[Change] = [
    *(another_rank, more_values_than_keys, a_mask_of_another_shape, a_mask_of_integers),
    *(too_many_used_keys, used_keys_of_another_batch, a_sparse_tensor),
]
VARLEN: list[Change] = [another_rank, decreasing_cu_seqlens, cu_seqlens_beyond_the_end]


def make_invalid(problem: Problem, seed: int) -> tuple[Problem, str]:
    """The problem's forward call with one invalid argument, and what was changed."""
    rng = Random(seed)
    changes = GENERAL + {"dense": DENSE, "with_tangent": DENSE, "varlen": VARLEN}.get(
        problem.entry, []
    )
    change = rng.choice(changes)
    given = problem.example(problem.given, 0) if problem.mapped else dict(problem.given)
    given = {n: x for n, x in given.items() if n in ("q", "k", "v", "attn_mask") or "seq" in n}
    if change is too_many_used_keys and len(given["q"]) == 0:
        change = another_dtype
    change(given, rng)
    changed = replace(problem, derivative="forward", given=given, mapped=None)
    return changed, change.__name__
