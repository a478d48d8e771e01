"""What the fuzzer demands of results.

The error of each result against the formula in float64 is at most twice that of the formula in the
precision of the computation, plus one rounding of the result's dtype. The precision is float32 for
half precision and float32, and float64 for float64.

The error of the formula is the largest of several variants, equal in exact arithmetic, which round
differently. None of them breaks ties: scores that are equal stay equal. So

- where rounding decides the result, as between huge scores that differ, the formula errs as well;
- where it does not, as between huge scores that are equal, the result must be right.

Rows of different magnitude, or of a very different error of the formula, are compared separately:
one row of huge numbers must not hide errors of the others. Where few numbers dominate the norm, it
is one of chance, and the allowance larger. Every row may have the usual error of its tensor,
because rows that cancel can be exact by chance.

Rows are not compared where the formula overflows in the precision or in the result's dtype.
Gradients are not compared if tO overflows the dtype in which derivatives of second order save it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.jvp_attn.attention_cases import Named
from tests.jvp_attn.fuzz_formula import Variant, rounding_errors
from tests.jvp_attn.fuzz_problems import Problem

SCORES = ("q", "k", "attn_mask")  # results depend on all other tensors linearly

VARIANTS = [
    Variant(),
    Variant(scale_first=False, divide_first=False, seed=1),
    Variant(divide_first=False, seed=2),
    Variant(scale_first=False, seed=3),
    Variant(divide_first=False, seed=4),
]


@dataclass
class Verdict:
    """What is wrong with the results of a problem.

    Attributes:
        faults: one line for each fault.
        ratio: the largest error, as a multiple of what is allowed.
        rows: how many rows were compared.
        undecided: how many of them depend on rounding: the error of the formula is above 10 %.
    """

    faults: list[str] = field(default_factory=list)
    ratio: float = 0.0
    rows: int = 0
    undecided: int = 0


def judge(problem: Problem, ours: Named) -> Verdict:
    """Compare the library's results of a problem with the formula."""
    verdict = Verdict()
    exact, others = problem.formula(Variant(), torch.float64), in_same_precision(problem)
    dtypes = problem.dtypes()
    if ours.keys() != exact.keys():
        verdict.faults.append(f"results {[*ours]}, not {[*exact]}")
        return verdict
    for n, tangent in (("out", "tout"), ("lse", "mu")):
        has_both = problem.derivative == "jvp" and n in exact and problem.entry != "merge"
        if has_both and ours[n].stride() != ours[tangent].stride():
            verdict.faults.append(f"{tangent} has other strides than {n}")
    tout_overflows = problem.stored_tangent_overflows()
    if not all(x.isfinite().all() for x in ours.values()):
        # An overflow of a product is no fault if that of slightly larger numbers overflows too.
        others.append(nearly_overflowing(problem, exact))
    for n, x in exact.items():
        if ours[n].shape != x.shape or ours[n].dtype != dtypes[n]:
            verdict.faults.append(
                f"{n} is {tuple(ours[n].shape)} {ours[n].dtype}, not {tuple(x.shape)} {dtypes[n]}"
            )
        elif not (tout_overflows and n.startswith(("d_", "t_d_", "dd_"))):
            compare(n, ours[n].detach(), x, [y[n] for y in others], verdict)
    return verdict


def in_same_precision(problem: Problem) -> list[dict[str, Tensor]]:
    """The results of the variants of the formula, rounded to the dtypes of the results."""
    wide = torch.promote_types(problem.dtype, torch.float32)
    dtypes = problem.dtypes()
    results = []
    # Delta is a few roundings of the precision off, or those of a sum of two halves.
    halves = torch.finfo(problem.dtype).eps ** 2 / 4
    row_sum_error = max(4 * torch.finfo(wide).eps, halves)
    for i, variant in enumerate(VARIANTS):
        variant = replace(variant, row_sum_error=row_sum_error)
        data = problem.data if i == 0 else perturbed(problem.data, wide, seed=i)
        found = problem.formula(variant, wide, data, merged=True)
        results.append({n: x.to(dtypes[n]).double() for n, x in found.items()})
    if problem.backend.startswith("emulated"):
        # The CUDA kernels round P, dS and similar matrices to half precision.
        found = problem.formula(Variant(), problem.dtype)
        results.append({n: x.to(dtypes[n]).double() for n, x in found.items()})
    return results


def nearly_overflowing(problem: Problem, exact: Named) -> dict[str, Tensor]:
    """The exact results, but not finite where those of 64 times larger tangents are not."""
    wide = torch.promote_types(problem.dtype, torch.float32)
    larger = {
        n: 64 * x.to(wide) if x.is_floating_point() and n not in SCORES else x
        for n, x in problem.data.items()
    }
    found = problem.formula(Variant(), wide, larger)
    return {n: x.where(found[n].isfinite(), torch.nan) for n, x in exact.items()}


def perturbed(data: Named, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The tensors that results depend on linearly, with rounding errors of this dtype.

    The scores keep their values: they may be tied.
    """
    result = {}
    for i, (n, x) in enumerate(data.items()):
        if n in SCORES or not x.is_floating_point():
            result[n] = x
        else:
            x = x.to(dtype)
            result[n] = x * (1 + 2 * torch.finfo(dtype).eps * rounding_errors(x, 100 * seed + i))
    return result


def compare(name: str, ours: Tensor, exact: Tensor, maths: list[Tensor], verdict: Verdict) -> None:
    """Compare one result with that in float64 and with those of the variants."""
    by_row = name not in ("lse", "mu", "dd_c_lse", "dd_c_mu") and exact.ndim > 0
    limits = torch.finfo(ours.dtype)
    tiny = limits.smallest_normal
    # The formula in float64 is rounded too, and so are results in the precision of the computation.
    wide = ours.dtype in (torch.float32, torch.float64)
    eps = limits.eps if wide else limits.eps / 2
    width = exact.shape[-1] if by_row and exact.numel() else 1
    found, true, *others = (x.double().reshape(-1, width) for x in (ours, exact, *maths))
    dead = (true == -torch.inf).all(-1) & (name == "lse")
    if not torch.equal(dead, (found == -torch.inf).all(-1) & dead):
        verdict.faults.append(f"{name} is not −inf in a row that sees no key")
    usable = (true.abs() < 0.99 * limits.max).all(-1) & ~dead
    for x in others:
        usable &= x.isfinite().all(-1)
    if not usable.any():
        return
    found, true, *others = (x[usable] for x in (found, true, *others))
    if not found.isfinite().all():
        bad = int((~found.isfinite()).any(-1).sum())
        verdict.faults.append(f"{name} is not finite in {bad} of {len(true)} rows, but exact is")
        found = found.where(found.isfinite(), true)
    errors = torch.stack([(x - true).abs().amax(-1) for x in others]).amax(0)
    size = true.abs().amax(-1).clamp(min=tiny)
    relative = (errors / size).clamp(eps, 1e6)
    nonzero = errors[errors > 0]
    usual = float(nonzero.median()) if nonzero.numel() else 0.0
    group = torch.stack([size.log10().div(3).round(), (relative / eps).log10().div(6).floor()], -1)
    verdict.rows += len(true)
    verdict.undecided += int((relative > 0.1).sum())
    for key in group.unique(dim=0):
        chosen = (group == key).all(-1)
        unit = max(float(size[chosen].amax()), float((found - true)[chosen].abs().amax()))
        x, y, *zs = (z[chosen] / unit for z in (found, true, *others))
        formula_errors = max((z - y for z in zs), key=lambda x: float(x.norm()))
        math_error = float(formula_errors.norm())
        chance = 1 + 10 / math.sqrt(min(y.unique().numel(), effective_number(formula_errors)))
        rounding = eps * float(y.norm()) * (chance if wide else 1)
        rounding += (usual + tiny) / unit * math.sqrt(y.numel())
        error, allowed = float((x - y).norm()), 2 * chance * math_error + rounding
        verdict.ratio = max(verdict.ratio, error / allowed)
        if error > allowed:
            verdict.faults.append(
                f"{name}: error {error:.2e}, allowed {allowed:.2e}, of {float(y.norm()):.2e} in "
                f"{int(chosen.sum())} rows, in units of {unit:.2e}; formula {math_error:.2e}"
            )


def effective_number(errors: Tensor) -> float:
    """Of how many equally large errors the norm would be as much one of chance."""
    largest = errors.abs().amax()
    if largest == 0:
        return float(errors.numel())
    squares = (errors / largest).square()
    return float(squares.sum().square() / squares.square().sum())
