"""`FlopCounterMode` counts the matrix products of attention, as it counts those of torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

import jvp_attn
from jvp_attn import flash_attn_jvp, flash_attn_varlen_jvp, replace_sdpa
from jvp_attn.autograd.ops import SIGNATURES, unpack
from jvp_attn.backends import tiled
from tests.jvp_attn.attention_cases import Case

B, M, N, H, D, V = 2, 5, 7, 4, 3, 6
PAIRS = 2 * B * H * M * N  # operations of one product with one column


def baddbmm_flop(total: Any, *products: Any, **options: Any) -> int:
    return bmm_flop(*products)


IN_PLACE = {torch.ops.aten.baddbmm_: baddbmm_flop}  # torch has no formula for it


def counted(f: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        f()
    return counter.get_total_flops()


def qkv(**options: Any) -> list[Tensor]:
    """Grouped heads, and head_dim_v ≠ head_dim."""
    shapes = (B, M, H, D), (B, N, H // 2, D), (B, N, H // 2, V)
    return [torch.randn(shape, **options) for shape in shapes]


def summed(tensors: Any) -> Tensor:
    return sum(x.sum() for x in tensors)


# Each with the products over head_dim and over head_dim_v.
USES: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "forward": (1, 1, flash_attn_jvp),
    "jvp": (3, 3, lambda *x: jvp(flash_attn_jvp, x, x)),
    "jvp along q": (2, 2, lambda q, k, v: jvp(lambda q: flash_attn_jvp(q, k, v), (q,), (q,))),
    "jvp along v": (1, 2, lambda q, k, v: jvp(lambda v: flash_attn_jvp(q, k, v), (v,), (v,))),
    "backward": (1 + 3, 1 + 2, lambda *x: flash_attn_jvp(*x).sum().backward()),
    "backward of jvp": (
        *(3 + 7, 3 + 5),
        lambda *x: summed(jvp(flash_attn_jvp, x, tuple(y.detach() for y in x))).backward(),
    ),
    "causal": (1, 1, lambda *x: flash_attn_jvp(*x, causal=True)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_derivatives_take_as_many_products_as_the_algorithm(use: str, device: str) -> None:
    over_d, over_v, f = USES[use]
    x = qkv(device=device, requires_grad=True)
    assert counted(lambda: f(*x)) == PAIRS * (over_d * D + over_v * V)


@pytest.mark.parametrize("use", USES)
def test_fake_tensors_have_the_same_counts(use: str) -> None:
    over_d, over_v, f = USES[use]
    with FakeTensorMode():
        x = qkv(requires_grad=True)
        assert counted(lambda: f(*x)) == PAIRS * (over_d * D + over_v * V)


def test_all_gradients_of_a_jvp_take_15_products() -> None:
    """Those of the tangents too."""
    x, tx = qkv(requires_grad=True), qkv(requires_grad=True)
    outputs = jvp(flash_attn_jvp, tuple(x), tuple(tx))
    assert counted(lambda: summed(outputs).backward()) == PAIRS * (9 * D + 6 * V)


def test_counts_are_those_of_torchs_attention() -> None:
    def step(attention: Callable[..., Tensor]) -> None:
        q, k, v = (torch.randn(B, H, n, 8, requires_grad=True) for n in (M, N, N))
        attention(q, k, v).sum().backward()

    ours = counted(lambda: step(jvp_attn.scaled_dot_product_attention))
    assert ours == 7 * PAIRS * 8
    with sdpa_kernel(SDPBackend.MATH):  # torch has no formula for its fused attention on a CPU
        assert counted(lambda: step(F.scaled_dot_product_attention)) == 6 * PAIRS * 8


# ----------------------------------------------------------------------------
# Every combination of tangents, cotangents and needs


TANGENTS = ["", "q", "k", "v", "m", "qkvm", "kv"]
COTANGENTS = list(product([False, True], repeat=4))
ALL, NONE = [True] * 8, [False] * 8
NEEDS = [ALL, NONE, *([i == j for j in range(8)] for i in range(8))]
PROBLEMS = [
    *(("forward_jvp", tangents, COTANGENTS[0], NONE) for tangents in TANGENTS),
    *(("backward", "", c, needs) for c in COTANGENTS[::4] for needs in NEEDS[:6]),
    *(("jvp_backward", t, c, ALL) for t in TANGENTS for c in COTANGENTS[::3]),
    *(("jvp_backward", t, COTANGENTS[-1], needs) for t in TANGENTS[-3:] for needs in NEEDS),
]
SCALARS = (1.0, 0, "tiled", True, None, True, 1)


def arguments(name: str, tangents: str, cotangents: tuple[bool, ...], needs: Any) -> list[Any]:
    """Flat arguments of an operator, with an additive mask."""
    case = Case(mask="additive", causal=False)
    data = case.data()
    inputs = [data["q"], data["k"], data["v"], data["attn_mask"].clamp(min=-1), None, None, None]
    directions = [inputs[i] if letter in tangents else None for i, letter in enumerate("qkvm")]
    flat = inputs + directions if "jvp" in name else inputs
    if "backward" in name:
        forward = name.replace("backward", "forward").replace("jvp_forward", "forward_jvp")
        outputs = getattr(torch.ops.jvp_attn, forward)(*flat, *SCALARS)
        ends = outputs[:4] if "jvp" in name else outputs[:2]
        flat = flat + list(outputs)
        flat += [y if given else None for y, given in zip(ends, cotangents, strict=False)]
        flat.append(needs[: 8 if "jvp" in name else 4])
    return [*flat, *SCALARS]


def test_formulas_count_the_products_of_the_tiled_backend() -> None:
    """Its products are matrix products of torch, which torch counts."""
    for problem in PROBLEMS:
        flat, name = arguments(*problem), problem[0]
        groups = unpack(SIGNATURES[name], flat)
        by_formula = counted(partial(getattr(torch.ops.jvp_attn, name), *flat))
        assert by_formula == counted(partial(getattr(tiled, name), *groups)), problem


# ----------------------------------------------------------------------------
# Packed sequences, models


def test_packed_sequences_count_their_own_pairs() -> None:
    lengths = [2, 0, 3]
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

    def f(q: Tensor, cu_seqlens: Tensor) -> Tensor:
        return flash_attn_varlen_jvp(q, q, q, cu_seqlens, cu_seqlens, 3, 3)

    q = torch.randn(5, H, D)
    per_pair = 4 * H * D
    assert counted(lambda: f(q, cu_seqlens)) == per_pair * sum(n * n for n in lengths)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q), mode.from_tensor(cu_seqlens)
        assert counted(lambda: f(*fake)) == per_pair * 3 * 3**2


def test_a_model_takes_its_matrix_products_and_its_attention() -> None:
    width, tokens = 8, 6

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = nn.Sequential(Block(), Block())
    x, tx = torch.randn(2, B, tokens, width)
    qkv, out = 2 * B * tokens * width * 3 * width, 2 * B * tokens * width * width
    attention = 2 * B * H * tokens**2 * (width // H)  # one product

    with replace_sdpa(), FlopCounterMode(display=False) as counter:
        assert counted(lambda: model(x)) == 2 * (qkv + out + 2 * attention)
        y, ty = jvp(model, (x,), (tx,))
        (y + ty).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.jvp_attn.forward] == 2 * 2 * attention
    assert counts[torch.ops.jvp_attn.forward_jvp] == 2 * 6 * attention
    assert counts[torch.ops.jvp_attn.jvp_backward] == 2 * 15 * attention
    assert set(counts) - {torch.ops.aten.mm, torch.ops.aten.addmm} == set(ATTENTION)


ATTENTION = [
    torch.ops.jvp_attn.forward,
    torch.ops.jvp_attn.forward_jvp,
    torch.ops.jvp_attn.jvp_backward,
]
