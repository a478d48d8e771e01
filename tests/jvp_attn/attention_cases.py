"""What the tests of attention share: cases with their data, all that derives from them, oracles."""

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
    mask: str | None = None  # "boolean" or "additive"; both hide about a third, and a whole row
    mask_dims: str = "bhqk"  # from the right; of size 1 where there is a dot
    with_tangent: str = "qkv"  # the others have none; "m" is the mask
    torchs_interface: bool = False  # scaled_dot_product_attention, whose causal is top-left
    dtype: torch.dtype = torch.float64

    def data(self) -> dict[str, Tensor]:
        """q, k, v, attn_mask where there is one, and tq, tk, tv, tattn_mask where they move."""
        q_shape = (self.batch, self.seqlen_q, self.heads, self.head_dim)
        k_shape = (self.batch, self.seqlen_k, self.heads_k, self.head_dim)
        v_shape = (self.batch, self.seqlen_k, self.heads_k, self.head_dim_v)
        shapes = {"q": q_shape, "k": k_shape, "v": v_shape}
        if self.mask:
            shapes["attn_mask"] = self.mask_shape()
        shapes |= {f"t{x}": shapes[x] for x in (INPUTS[letter] for letter in self.with_tangent)}
        data = {x: randn(*shape, seed=x, dtype=self.dtype) for x, shape in shapes.items()}
        if self.mask:
            hidden = self._hidden_by_mask()
            additive = data["attn_mask"].masked_fill(hidden, -torch.inf)
            data["attn_mask"] = ~hidden if self.mask == "boolean" else additive
        return data

    def mask_shape(self) -> tuple[int, ...]:
        """As `mask_dims` says."""
        sizes = {"b": self.batch, "h": self.heads, "q": self.seqlen_q, "k": self.seqlen_k, ".": 1}
        return tuple(sizes[dim] for dim in self.mask_dims)

    def _hidden_by_mask(self) -> Tensor:
        hidden = randn(*self.mask_shape(), seed="hidden") < -0.5
        if "q" in self.mask_dims:
            hidden[..., 1:2, :] = True
        return hidden

    def primals(self) -> dict[str, Tensor]:
        """q, k, v, and attn_mask where there is one."""
        return replace(self, with_tangent="").data()

    def point_and_direction(self) -> tuple[Tensors, Tensors]:
        """(q, k, v) and (tq, tk, tv), or whatever else moves."""
        data = self.data()
        moving = [x for x in INPUTS.values() if f"t{x}" in data]
        return tuple(data[x] for x in moving), tuple(data[f"t{x}"] for x in moving)

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
        """The same of the naive formula, which torch differentiates by itself."""
        with jvp_attn.backend("math"):
            return self.ours(q, k, v, attn_mask)

    def torch_math(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor]:
        """(out,) of torch's own attention, in the variant that has all derivatives."""
        bias = None
        if self.causal or attn_mask is not None:
            bias = self._bias(attn_mask).to(q.dtype)
            # Its gradients are NaN where a row sees no key: such rows see all, and are left out.
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
        """The mask and causal as numbers to add to the scores."""
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
# All that derives from an attention


def with_tangents(attention: Attention, data: Named) -> dict[str, Tensor]:
    """out, out_tangent and, if the attention returns lse, lse and mu."""
    inputs = [x for x in INPUTS.values() if x in data]
    moving = [x for x in inputs if f"t{x}" in data]

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        primals = {**data, **dict(zip(moving, values, strict=True))}
        return attention(*(primals[x] for x in inputs))

    outputs, tangents = torch.func.jvp(
        of_moving, tuple(data[x] for x in moving), tuple(data[f"t{x}"] for x in moving)
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

    That function is a random projection of all outputs if no other is given. A boolean mask has
    no gradient.
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
    """Those of the names."""
    return {name: tensors[name] for name in names}


def rows_of(outputs: Named, which: slice | Tensor) -> dict[str, Tensor]:
    """Some rows of out, lse, out_tangent and mu."""
    return {n: x[:, which] if "out" in n else x[:, :, which] for n, x in outputs.items()}


def relative_error(actual: Tensor, expected: Tensor, least: float = 0.01) -> float:
    """‖actual − expected‖ / ‖expected‖, infinite where they disagree about what is infinite.

    A norm expected below `least` counts as that: a derivative that is zero, such as that of a
    softmax over one key, is zero up to rounding.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return torch.inf
    difference = (actual - expected)[~infinite].norm()
    return float(difference) / max(float(expected[~infinite].norm()), least)


def assert_exact_to_two_roundings(ours: Named, exact: Named) -> None:
    """In bfloat16, as kernels round P and the like to the dtype once, and the results once more."""
    errors = {name: relative_error(x, exact[name]) for name, x in ours.items()}
    assert all(error <= torch.finfo(torch.bfloat16).eps for error in errors.values()), errors


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
# Blocks and memory


@contextmanager
def small_tiles(scores: int, rows: int) -> Iterator[None]:
    """Cut attention into blocks of about so many scores and no fewer rows, at any length."""
    with mock.patch.multiple(tiles, _CPU_BLOCK=scores, _GPU_BLOCK=scores, _MIN_ROWS=rows):
        yield


def peak_and_largest_allocation(of: Callable[[], object]) -> tuple[int, int]:
    """In bytes: of all that a computation holds at once, and of the largest tensor."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        of()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes)), max(sizes)
