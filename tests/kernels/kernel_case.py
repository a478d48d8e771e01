"""Runs a kernel on a case, and compares its outputs with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from jvp_attn.backends.kernel_table import KERNELS, kernel_name
from tests.kernels.buffers import Buffer, buffer_of
from tests.kernels.cases import Case
from tests.kernels.dq_accum import ACCUMULATORS, accumulators_of, zeros
from tests.kernels.harness import READS, WRITES, Launch, output_buffers, row_buffer_of
from tests.kernels.problems import (
    data_of,
    dtype_of,
    huge,
    layouts_of,
    present_inputs,
    problem_of,
    random_of,
)
from tests.kernels.reference import INPUTS, ROW_VECTORS, Problem, attention, never_seen, parts

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]

OF_KEYS = ("grad_k", "grad_v", "grad_tk", "grad_tv")
OF_ROWS = ("out", "tout", "grad_q", "grad_tq")


@dataclass(frozen=True)
class KernelTest:
    """A case with its data in memory, and the expected outputs.

    Attributes:
        exact: the outputs in float64, from data that are rounded to elements.
        in_float32: the outputs in float32.
        strict: whether the error bound has no exceptions for special data.
    """

    case: Case
    problem: Problem
    shapes: Shapes
    inputs: dict[str, Buffer]
    exact: Tensors
    in_float32: Tensors
    strict: bool

    def run(self, seed: int = 0) -> Tensors:
        """The outputs of the case's kernel alone; all that it reads is exact.

        bwd_postprocess follows a kernel that writes dq_accum, so that dQ is compared.
        """
        kernel = KERNELS[self.case["kernel"]]
        kernels = [kernel.name]
        reads = [name for name in READS[kernel.step].split() if name not in INPUTS]
        if self.case.get("low order") == "absent":
            reads = [name for name in reads if not name.endswith("_lo")]
        given = {name: self._exact_buffer(name) for name in reads if name not in ACCUMULATORS}
        if ACCUMULATORS[0] in reads:
            given |= self._exact_dq_accum()
        wanted = self._wanted(kernel.step)
        if ACCUMULATORS[0] in wanted:
            kernels.append(kernel_name("bwd_postprocess", kernel.element))
            wanted += WRITES["bwd_postprocess"].split()
        outputs = self.outputs_of([x for x in wanted if x not in given])
        outputs |= {n: x for n, x in given.items() if n in WRITES[kernel.step].split()}
        self.launch(given | outputs, tuple(outputs)).run(*kernels, seed=seed)
        return {name: buffer.view for name, buffer in outputs.items() if name not in ACCUMULATORS}

    def launch(self, buffers: dict[str, Buffer], outputs: tuple[str, ...]) -> Launch:
        """A launch with the inputs and further buffers, of which `outputs` are writable."""
        writable = {name: buffers[name] for name in outputs}
        return Launch(
            self.problem,
            self.inputs | {n: b for n, b in buffers.items() if n not in writable},
            writable,
            columns_of_mask_first=self.case["layouts"] in ("heads first", "odd address"),
        )

    def outputs_of(self, names: list[str]) -> dict[str, Buffer]:
        """Memory for outputs; dq_accum and ds_row_sums are 0."""
        shapes = {name: self._shape(name) for name in names if name not in ACCUMULATORS}
        layouts = layouts_of(self.case, [n for n in shapes if n not in ROW_VECTORS], expanded=False)
        outputs = output_buffers(shapes, dtype_of(self.case), layouts)
        sums = zeros(self.problem, self.shapes["q"])
        return outputs | {name: sums[name] for name in names if name in ACCUMULATORS}

    def _wanted(self, step: str) -> list[str]:
        names = self.case.get("wanted", WRITES[step]).split()
        if self.case.get("low order") == "not wanted":
            names = [name for name in names if not name.endswith("_lo")]
        return names

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in ROW_VECTORS:
            return self.shapes["grad_lse"]
        if name.removesuffix("_lo") in ("out", "tout"):
            return self.shapes["grad_out"]
        return self.shapes[name.removeprefix("grad_")]

    def _exact_buffer(self, name: str) -> Buffer:
        belongs = self._belongs_to_a_sequence(name.removesuffix("_lo"))
        if name in ROW_VECTORS:
            row = self.exact[name.removesuffix("_lo")]
            if name.endswith("_lo"):
                row = (row - row.float()).nan_to_num()  # 0 where lse is -inf
            return row_buffer_of(row.float().masked_fill(~belongs, torch.nan))
        tensor = self.exact[name.removesuffix("_lo")]
        rounded = tensor.to(dtype_of(self.case))
        if name.endswith("_lo"):
            rounded = (tensor - rounded.double()).to(rounded.dtype)
        rounded = rounded.masked_fill(~belongs[..., None], torch.nan)
        (layout,) = layouts_of(self.case, [name], expanded=False).values()
        return buffer_of(rounded, layout)

    def _exact_dq_accum(self) -> dict[str, Buffer]:
        """dq_accum and ds_row_sums, with an error in dS that bwd_postprocess must remove.

        The error is spread evenly over the first keys of each row, up to 16, that it sees.
        """
        q, k = self.inputs["q"].view, self.inputs["k"].view
        scale = self.problem.softmax_scale
        products = self.exact["grad_q"] / (scale or 1)
        totals = torch.zeros(self.shapes["grad_lse"], dtype=torch.float64)
        if "grad_lse" in self.inputs:
            totals += self.inputs["grad_lse"].view
        excess = 0.01 * torch.randn(totals.shape, generator=random_of(self.case, "excess"))
        group = q.shape[2] // k.shape[2]
        for part in parts(self.problem, q, k):
            visible = part.bias.isfinite()[..., :16].double()
            count = visible.sum(-1, keepdim=True)
            own = k[part.batch, part.keys][:16].double().transpose(0, 1)
            mean = visible / count.clamp(min=1) @ own.repeat_interleave(group, 0)
            more = excess[part.batch, :, part.queries] * (count[..., 0] > 0)
            products[part.batch, part.queries] += (more[..., None] * mean).transpose(0, 1)
            totals[part.batch, :, part.queries] += more
        return accumulators_of(self.problem, products, totals)

    # ------------------------------------------------------------------------
    # Comparison

    def faults(self, outputs: Tensors) -> list[str]:
        """What is wrong with the outputs of kernels; empty if they are right."""
        faults = []
        for name, actual in outputs.items():
            if name in ACCUMULATORS:
                continue  # compared as grad_q
            if name.endswith("_lo"):
                faults += self._faults_of_lo(name, outputs)
            else:
                faults += self._faults_of(name, actual)
        return faults

    def _faults_of(self, name: str, actual: Tensor) -> list[str]:
        faults = []
        belongs = self._belongs_to_a_sequence(name)
        if not actual[~belongs].isnan().all():
            faults.append(f"{name} was written in rows that belong to no sequence")
        actual, exact, rounded = (
            x[belongs] for x in (actual, self.exact[name], self.in_float32[name].to(actual.dtype))
        )
        vanishes = self._vanishes(name)[belongs]
        if not (actual[vanishes] == 0).all():
            faults.append(f"{name} is not 0 where no key is visible")
        error = relative_error(actual, exact)
        allowed = max(2 * relative_error(rounded, exact), self._floor(name))
        if not error <= allowed:
            faults.append(f"{name} has an error of {error:.2e}, {allowed:.2e} allowed")
        return faults

    def _floor(self, name: str) -> float:
        """The error that is always allowed: one rounding, for most outputs."""
        rounding = torch.finfo(dtype_of(self.case)).eps / 2
        # Sums in float32 of exact terms, or of terms that were rounded twice.
        if name == "lse":
            return 1e-6
        if name == "mu":
            return max(3e-5, self._rounding_of_terms("mu")) if self._has_few_terms else 3e-5
        if name in ("beta", "delta") and self.case.get("low order") == "given":
            size = self._size_of_terms(name, "products") if self._has_few_terms else 1
            return (1e-6 + rounding**2) * max(1, size)
        if name in ("beta", "delta") and "low order" not in self.case:
            return 1e-6 + self._rounding_of_terms(name)
        # With large logits, or one row or key, few terms contribute. Their errors do not average
        # out, so that two roundings may add up: of the weights and of the result. In tO the rounded
        # weights multiply differences, of which the result may be smaller. With few columns, keys
        # with large weights are similar, and gradients are small differences.
        if self.strict:
            return rounding
        if f"{name}_terms" in self.exact:
            rounding += self._rounding_of_terms(name)
        if self.case["head dims"] == "tiny":
            return 10 * rounding
        if not self._has_few_terms:
            return rounding
        if name == "tout":
            return rounding * max(2, 1 + self._size_of_terms(name))
        return 2 * rounding

    @property
    def _has_few_terms(self) -> bool:
        """Whether so few terms contribute to a result that their errors do not average out."""
        one_row_or_key = "1" in (self.case["queries"], self.case["keys"])
        return not self.strict and (self.case["data"] == "large logits" or one_row_or_key)

    def _rounding_of_terms(self, name: str) -> float:
        """The error in float32 of a result whose terms nearly cancel.

        Such results are the corrected beta and delta, from which a kernel subtracts the sum of a
        row, which is 0 up to a cotangent; and gradients where a query sees one key.
        """
        return 2 * torch.finfo(torch.float32).eps * self._size_of_terms(name)

    def _size_of_terms(self, name: str, kind: str = "terms") -> float:
        """How much larger the terms of a result are than the result."""
        belongs = self._belongs_to_a_sequence(name)
        terms = self.exact[f"{name}_{kind}"][belongs]
        return float(terms.norm()) / magnitude(self.exact[name][belongs])

    def _faults_of_lo(self, name: str, outputs: Tensors) -> list[str]:
        belongs = self._belongs_to_a_sequence(name.removesuffix("_lo"))
        rest, rounded = (outputs[x][belongs] for x in (name, name.removesuffix("_lo")))
        limits = torch.finfo(rounded.dtype)
        if (rest.double().abs() <= limits.eps / 2 * rounded.double().abs() + limits.tiny).all():
            return []
        return [f"{name} is larger than a rounding error"]

    def _belongs_to_a_sequence(self, name: str) -> Tensor:
        """Which rows of an output belong to a sequence; of its shape without columns."""
        along = "k" if name in OF_KEYS else "q"
        starts = self.problem.cu_seqlens_k if along == "k" else self.problem.cu_seqlens_q
        batch, rows, heads, _ = self.shapes[along]
        belongs = torch.ones(batch, rows, heads, dtype=torch.bool)
        if starts is not None:
            belongs[:, starts[-1] :] = False
        return belongs.mT if name in ROW_VECTORS else belongs

    def _vanishes(self, name: str) -> Tensor:
        """Which rows of an output must be exactly zero; of its shape without columns."""
        q, k = self.inputs["q"].view, self.inputs["k"].view
        if name in OF_KEYS:
            return never_seen(self.problem, q, k)
        dead = self.exact["lse"] == -torch.inf
        if name in OF_ROWS:
            return dead.mT
        return dead if name == "mu" else torch.zeros_like(dead)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖, infinite where they disagree about what is infinite."""
    actual = actual.double()
    infinite = exact.isinf()
    if not torch.equal(actual[infinite], exact[infinite]):
        return torch.inf
    actual, exact = actual[~infinite], exact[~infinite]
    return float((actual - exact).norm()) / magnitude(exact)


def magnitude(exact: Tensor) -> float:
    """‖exact‖, at least 1% of that of data of size 1.

    Some results are zero up to rounding, such as the gradient of a softmax over one key.
    """
    return max(float(exact.norm()), 0.01 * max(exact.numel(), 1) ** 0.5)


def kernel_test(case: Case, *, strict: bool = False) -> KernelTest:
    """A case with its data and expected outputs."""
    problem, shapes = problem_of(case)
    data = data_of(case, problem, shapes)
    layouts = layouts_of(
        case, [n for n in present_inputs(case) if n not in ROW_VECTORS], expanded=True
    )
    inputs = {
        name: row_buffer_of(x) if name in ROW_VECTORS else buffer_of(x, layouts[name])
        for name, x in data.items()
    }
    values = {name: buffer.view for name, buffer in inputs.items()}
    # The formula multiplies masked values by 0; in float32 products with them may be infinite.
    limit = huge(dtype_of(case)) / 2
    not_huge = {name: x.where(x.abs() < limit, 0) for name, x in values.items()}
    return KernelTest(
        case,
        problem,
        shapes,
        inputs,
        attention(problem, values),
        attention(problem, not_huge, torch.float32),
        strict,
    )


def seed_of(case: Case) -> int:
    """A scheduling seed for a case, the same each time."""
    return crc32(repr(sorted(case.items())).encode())
