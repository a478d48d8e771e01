"""Attention problems with their data, derivatives and oracles, shared by the tests of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from unittest import mock
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import keystr, tree_flatten_with_path

import jvp_attn
from jvp_attn import flash_attn_jvp
from jvp_attn.backends import tiles

# (q, k, v), and attn_mask where there is one → (out, lse), or only out.
Attention = Callable[..., tuple[Tensor, ...]]
Tensors = tuple[Tensor, ...]
Named = Mapping[str, Tensor]

# What may have a tangent, by the letter of `Case.with_tangent`, in the order of the arguments.
INPUTS = {"q": "q", "k": "k", "v": "v", "m": "attn_mask"}

# The backends that run on every device.
BACKENDS = [name for name in jvp_attn.available_backends() if name != "cuda"]

# Rounding the inputs to float16 and computing a primitive in it give errors of about half an eps
# each, and the derivatives here compose up to five primitives. Most errors cancel partly.
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
    mask: str | None = None  # "boolean" or "additive"; masks a third of the keys and one full row
    mask_dims: str = "bhqk"  # from the right; of size 1 where there is a dot
    with_tangent: str = "qkv"  # the others have none; "m" is the mask
    torchs_interface: bool = False  # scaled_dot_product_attention, whose causal is top-left
    dtype: torch.dtype = torch.float64

    def data(self) -> dict[str, Tensor]:
        """q, k, v and attn_mask, and their tangents tq, tk, tv and tattn_mask, if present."""
        q_shape = (self.batch, self.seqlen_q, self.heads, self.head_dim)
        k_shape = (self.batch, self.seqlen_k, self.heads_k, self.head_dim)
        v_shape = (self.batch, self.seqlen_k, self.heads_k, self.head_dim_v)
        shapes = {"q": q_shape, "k": k_shape, "v": v_shape}
        if self.mask:
            shapes["attn_mask"] = self.mask_shape()
        shapes |= {f"t{x}": shapes[x] for x in (INPUTS[letter] for letter in self.with_tangent)}
        data = {x: randn(*shape, seed=x, dtype=self.dtype) for x, shape in shapes.items()}
        if self.mask:
            masked_out = self._masked_out()
            additive = data["attn_mask"].masked_fill(masked_out, -torch.inf)
            data["attn_mask"] = ~masked_out if self.mask == "boolean" else additive
        return data

    def mask_shape(self) -> tuple[int, ...]:
        """As `mask_dims` says."""
        sizes = {"b": self.batch, "h": self.heads, "q": self.seqlen_q, "k": self.seqlen_k, ".": 1}
        return tuple(sizes[dim] for dim in self.mask_dims)

    def _masked_out(self) -> Tensor:
        masked_out = randn(*self.mask_shape(), seed="hidden") < -0.5
        if "q" in self.mask_dims:
            masked_out[..., 1:2, :] = True
        return masked_out

    def primals(self) -> dict[str, Tensor]:
        """q, k, v, and attn_mask where there is one."""
        return replace(self, with_tangent="").data()

    def point_and_direction(self) -> tuple[Tensors, Tensors]:
        """The inputs that have tangents, and these tangents."""
        data = self.data()
        names = [x for x in INPUTS.values() if f"t{x}" in data]
        return tuple(data[x] for x in names), tuple(data[f"t{x}"] for x in names)

    def ours(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(out, lse) of `flash_attn_jvp`, or (out,) of `scaled_dot_product_attention`."""
        if self.torchs_interface:
            out = jvp_attn.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)),
                attn_mask=attn_mask,
                is_causal=self.causal,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            return (out.transpose(1, 2),)
        return flash_attn_jvp(
            *(q, k, v),
            attn_mask=attn_mask,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            return_lse=True,
        )

    def naive(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The same by the naive formula, which torch differentiates itself."""
        with jvp_attn.backend("math"):
            return self.ours(q, k, v, attn_mask)

    def torch_math(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor]:
        """(out,) of torch's own attention, by its backend MATH, which has all derivatives."""
        bias = None
        if self.causal or attn_mask is not None:
            bias = self._bias(attn_mask).to(q.dtype)
            # Its gradients are NaN in fully masked rows: unmask these and zero their outputs.
            dead = (bias == -torch.inf).all(-1, keepdim=True)
            bias = bias.masked_fill(dead, 0)
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)),
                attn_mask=bias,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
        out = out if bias is None else out.masked_fill(dead, 0)
        return (out.transpose(1, 2),)

    def _bias(self, attn_mask: Tensor | None) -> Tensor:
        """The mask and `causal` as one additive mask."""
        later = torch.zeros(self.seqlen_q, self.seqlen_k, dtype=torch.bool)
        if self.causal:
            offset = 0 if self.torchs_interface else self.seqlen_k - self.seqlen_q
            later = torch.ones_like(later).triu(offset + 1)
        bias = torch.zeros(later.shape, dtype=self.dtype).masked_fill(later, -torch.inf)
        if attn_mask is None:
            return bias
        if attn_mask.dtype == torch.bool:
            return bias.masked_fill(~attn_mask, -torch.inf)
        return bias + attn_mask


def randn(*shape: int, seed: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal random numbers, the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(crc32(seed.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ----------------------------------------------------------------------------
# Outputs, tangents and gradients


def with_tangents(attention: Attention, data: Named) -> dict[str, Tensor]:
    """out, out_tangent and, if the attention returns lse, lse and mu."""
    inputs = [x for x in INPUTS.values() if x in data]
    names = [x for x in inputs if f"t{x}" in data]

    def outputs_of(*values: Tensor) -> tuple[Tensor, ...]:
        primals = {**data, **dict(zip(names, values, strict=True))}
        return attention(*(primals[x] for x in inputs))

    outputs, tangents = torch.func.jvp(
        outputs_of, tuple(data[x] for x in names), tuple(data[f"t{x}"] for x in names)
    )
    return {
        **dict(zip(("out", "lse"), outputs, strict=False)),
        **dict(zip(("out_tangent", "mu"), tangents, strict=False)),
    }


def without_tangents(attention: Attention, data: Named) -> dict[str, Tensor]:
    """out and, if the attention returns it, lse."""
    inputs = [data[x] for x in INPUTS.values() if x in data]
    return dict(zip(("out", "lse"), attention(*inputs), strict=False))


def projection(*names: str, dtype: torch.dtype | None = None) -> Callable[[Named], Tensor]:
    """A random linear function of the named outputs, of all if none is named.

    Its weights are representable in the dtype. An lse of −inf counts as 0.
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
    """A scalar function of the outputs with derivatives of every order."""
    return sum(((x**3).sum() for x in outputs), torch.zeros(()))


def outputs_and_gradients(
    attention: Attention,
    data: Named,
    *,
    evaluate: Callable[[Attention, Named], dict[str, Tensor]] = with_tangents,
    through: Callable[[Named], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs, and the gradients of a function of them: "grad_q", ...

    The default function is a random projection of all outputs. Boolean masks have no gradient.
    """
    through = through or projection()
    leaves = {x: y.detach().requires_grad_() for x, y in data.items() if y.is_floating_point()}
    outputs = evaluate(attention, {**data, **leaves})
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
    """The tensors with these names."""
    return {name: tensors[name] for name in names}


def rows_of(outputs: Named, which: slice | Tensor) -> dict[str, Tensor]:
    """Some rows of out, lse, out_tangent and mu."""
    return {n: x[:, which] if "out" in n else x[:, :, which] for n, x in outputs.items()}


def relative_error(actual: Tensor, expected: Tensor, least: float = 0.01) -> float:
    """‖actual − expected‖ / ‖expected‖, infinite if they differ in which elements are infinite.

    An expected norm below `least` counts as `least`: a derivative that is exactly zero, such as
    that of a softmax over one key, is computed as zero up to rounding.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return torch.inf
    difference = (actual - expected)[~infinite].norm()
    return float(difference) / max(float(expected[~infinite].norm()), least)


def assert_exact_to_two_roundings(ours: Named, exact: Named) -> None:
    """In bfloat16: kernels round P and similar matrices once, and the results once more."""
    errors = {name: relative_error(x, exact[name]) for name, x in ours.items()}
    assert all(error <= torch.finfo(torch.bfloat16).eps for error in errors.values()), errors


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of nested tuples, named by their place; None is left out."""
    places = tree_flatten_with_path(tree)[0]
    return {keystr(place): x for place, x in places if x is not None}


def assert_close(actual: Named, expected: Named, tolerance: float = 1e-12) -> None:
    """Each of the named tensors has the shape, dtype and, within the tolerance, values expected.

    For the emulated backend, which computes in half precision, a tolerance above 0 is raised.
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
# Tiling and memory


@contextmanager
def small_tiles(scores: int, rows: int) -> Iterator[None]:
    """Tile attention into blocks of about this many scores, and at least this many rows."""
    with mock.patch.multiple(tiles, _CPU_BLOCK=scores, _GPU_BLOCK=scores, _MIN_ROWS=rows):
        yield


def peak_and_largest_allocation(of: Callable[[], object]) -> tuple[int, int]:
    """Peak memory of a computation and its largest allocation, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        of()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes)), max(sizes)
