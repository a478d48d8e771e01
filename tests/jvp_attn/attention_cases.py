"""What the tests of attention share: cases with their data, all that derives from them, oracles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import keystr, tree_flatten_with_path

import jvp_attn
from jvp_attn import blockwise, flash_attn_jvp

# (q, k, v) → (out, lse), or only out.
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Tensors = tuple[Tensor, ...]
Named = Mapping[str, Tensor]

# Those that compute on every device.
BACKENDS = [name for name in jvp_attn.available_backends() if name != "cuda"]

# Inputs rounded to float16 and a map computed in it have errors of about half an eps each, and the
# derivatives here compose up to five maps; most errors go different ways.
HALF_TOLERANCE = 4 * torch.finfo(torch.float16).eps


@dataclass(frozen=True)
class Case:
    """An attention problem. Its data are random, O(1), and the same each time."""

    batch: int = 2
    seqlen_q: int = 5
    seqlen_k: int = 7
    heads: int = 4
    heads_k: int = 2
    head_dim: int = 3
    head_dim_v: int = 6
    causal: bool = False
    softmax_scale: float | None = None
    with_tangent: str = "qkv"  # the others have none
    dtype: torch.dtype = torch.float64

    def data(self) -> dict[str, Tensor]:
        """q, k, v, and tq, tk, tv where there is such a tangent."""
        q_shape = (self.batch, self.seqlen_q, self.heads, self.head_dim)
        k_shape = (self.batch, self.seqlen_k, self.heads_k, self.head_dim)
        v_shape = (self.batch, self.seqlen_k, self.heads_k, self.head_dim_v)
        shapes = {"q": q_shape, "k": k_shape, "v": v_shape}
        shapes |= {f"t{x}": shapes[x] for x in self.with_tangent}
        return {x: randn(*shape, seed=x, dtype=self.dtype) for x, shape in shapes.items()}

    def primals(self) -> dict[str, Tensor]:
        """q, k, v."""
        return replace(self, with_tangent="").data()

    def point_and_direction(self) -> tuple[Tensors, Tensors]:
        """(q, k, v) and (tq, tk, tv)."""
        data = self.data()
        return tuple(data[x] for x in ("q", "k", "v")), tuple(data[x] for x in ("tq", "tk", "tv"))

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of `flash_attn_jvp`."""
        return flash_attn_jvp(
            q, k, v, softmax_scale=self.softmax_scale, causal=self.causal, return_lse=True
        )

    def naive(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of the naive formula, which torch differentiates by itself."""
        with jvp_attn.backend("math"):
            return self.ours(q, k, v)

    def torch_math(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        """(out,) of torch's own attention, in the variant that has all derivatives."""
        # Its gradients are NaN where a row sees no key: such rows are cut off and put back.
        dead_rows = max(self.seqlen_q - self.seqlen_k, 0) if self.causal else 0
        visible = None
        if self.causal:
            visible = torch.ones(self.seqlen_q, self.seqlen_k, dtype=torch.bool)
            visible = visible.tril(self.seqlen_k - self.seqlen_q)[dead_rows:]
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q[:, dead_rows:], k, v)),
                attn_mask=visible,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
        return (F.pad(out.transpose(1, 2), (0, 0, 0, 0, dead_rows, 0)),)


def randn(*shape: int, seed: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal random numbers, the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(crc32(seed.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ----------------------------------------------------------------------------
# All that derives from an attention


def with_tangents(attention: Attention, data: Named) -> dict[str, Tensor]:
    """out, out_tangent and, if the attention returns lse, lse and mu."""
    moving = [x for x in ("q", "k", "v") if f"t{x}" in data]

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        primals = {**data, **dict(zip(moving, values, strict=True))}
        return attention(primals["q"], primals["k"], primals["v"])

    outputs, tangents = torch.func.jvp(
        of_moving, tuple(data[x] for x in moving), tuple(data[f"t{x}"] for x in moving)
    )
    return {
        **dict(zip(("out", "lse"), outputs, strict=False)),
        **dict(zip(("out_tangent", "mu"), tangents, strict=False)),
    }


def without_tangents(attention: Attention, data: Named) -> dict[str, Tensor]:
    """out and, if the attention returns it, lse."""
    return dict(zip(("out", "lse"), attention(data["q"], data["k"], data["v"]), strict=False))


def projection(*names: str, dtype: torch.dtype | None = None) -> Callable[[Named], Tensor]:
    """A random linear function of the named outputs, of all if none is named.

    Its weights are exact in the dtype. Where lse is −inf it does not count.
    """

    def project(outputs: Named) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in names or outputs:
            x = outputs[name]
            weights = randn(*x.shape, seed=f"weights of {name}", dtype=dtype or x.dtype).to(x.dtype)
            total = total + (weights * x.masked_fill(x == -torch.inf, 0)).sum()
        return total

    return project


def energy(outputs: Iterable[Tensor]) -> Tensor:
    """A function of the outputs that has derivatives of every order."""
    return sum(((x**3).sum() for x in outputs), torch.zeros(()))


def outputs_and_gradients(
    attention: Attention,
    data: Named,
    *,
    evaluate: Callable[[Attention, Named], dict[str, Tensor]] = with_tangents,
    through: Callable[[Named], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs, and the gradients of a function of them for all data: "grad_q", ...

    That function is a random projection of all outputs if no other is given.
    """
    through = through or projection()
    leaves = {name: x.detach().requires_grad_() for name, x in data.items()}
    outputs = evaluate(attention, leaves)
    gradients = torch.autograd.grad(
        through(outputs), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {
        **{name: x.detach() for name, x in outputs.items()},
        **{f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


# ----------------------------------------------------------------------------
# Comparison


def part(tensors: Named, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the names."""
    return {name: tensors[name] for name in names}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, infinite where they disagree about what is infinite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return torch.inf
    difference = (actual - expected)[~infinite].norm()
    # A derivative that is zero, such as that of a softmax over one key, is zero up to rounding.
    return float(difference / expected[~infinite].norm().clamp(min=0.01))


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors in nested tuples, by their place; there may be None among them."""
    places = tree_flatten_with_path(tree)[0]
    return {keystr(place): x for place, x in places if x is not None}


def assert_close(actual: Named, expected: Named, tolerance: float = 1e-12) -> None:
    """Each of the named tensors has the shape, dtype and, within the tolerance, values expected.

    A backend that computes in half precision is allowed that, where not 0 is the tolerance.
    """
    if jvp_attn.current_backend() == "emulated" and tolerance > 0:
        tolerance = HALF_TOLERANCE
    assert actual.keys() == expected.keys() != set()
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        assert actual[name].dtype == x.dtype, name
    errors = {name: relative_error(actual[name], x) for name, x in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors


# ----------------------------------------------------------------------------
# Blocks


@contextmanager
def small_blocks(scores: int, rows: int) -> Iterator[None]:
    """Cut attention into blocks of about so many scores and no fewer rows, at any length."""
    with mock.patch.multiple(blockwise, _CPU_BLOCK=scores, _GPU_BLOCK=scores, _MIN_ROWS=rows):
        yield
