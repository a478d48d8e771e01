"""Random calls of every entry point and derivative, compared with the formula in float64.

A failure names the seeds that failed. To run some of them alone, with the traceback:

    python -m tests.jvp_attn.test_fuzz 17 423
    python -m tests.jvp_attn.test_fuzz --backend emulated 5
"""

from __future__ import annotations

import argparse
import warnings
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import jvp_attn
from tests.jvp_attn.emulated_backend import emulated_backend
from tests.jvp_attn.fuzz_draw import draw
from tests.jvp_attn.fuzz_invalid import make_invalid
from tests.jvp_attn.fuzz_problems import Problem
from tests.jvp_attn.fuzz_rule import judge

pytestmark = pytest.mark.slow

SEEDS = 1000
EMULATED_SEEDS = 80
INVALID_SEEDS = 1000


def backend_of(problem: Problem) -> AbstractContextManager[None]:
    match problem.backend:
        case "emulated sm80":
            return emulated_backend((8, 0))
        case "emulated sm90":
            return emulated_backend((9, 0))
        case name:
            return jvp_attn.backend(name)


def faults_of(problem: Problem) -> list[str]:
    """What is wrong with the results of a problem, and with what the call did to its arguments."""
    before = {n: (x._version, memory_of(x).clone()) for n, x in problem.given.items()}
    with backend_of(problem), warnings.catch_warnings():
        # torch warns that a causal bias with more queries than keys leaves rows without a key.
        warnings.filterwarnings("ignore", message="Lower right causal bias")
        ours = problem.ours()
    faults = judge(problem, ours).faults
    for n, x in problem.given.items():
        version, memory = before[n]
        if x._version != version or not torch.equal(memory_of(x), memory):
            faults.append(f"{n} was modified")
    return faults


def memory_of(x: Tensor) -> Tensor:
    """All bytes of the memory that x is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def failures(seeds: range, backend: str | None = None) -> str:
    """A line for each fault of each seed."""
    lines = []
    for seed in seeds:
        problem = draw(seed, backend)
        try:
            faults = faults_of(problem)
        except Exception as error:
            faults = [f"{type(error).__name__}: {error}"]
        if faults:
            lines += [f"seed {seed}: {problem}", *(f"    {fault}" for fault in faults)]
    return "\n".join(lines)


def chunks(total: int, size: int) -> list[range]:
    return [range(i, min(i + size, total)) for i in range(0, total, size)]


def over_seeds(total: int, size: int) -> pytest.MarkDecorator:
    ranges = chunks(total, size)
    return pytest.mark.parametrize("seeds", ranges, ids=[f"{x[0]}-{x[-1]}" for x in ranges])


@over_seeds(SEEDS, 100)
def test_random_calls_equal_the_formula_and_modify_no_input(seeds: range) -> None:
    assert not (found := failures(seeds)), found


@over_seeds(EMULATED_SEEDS, 10)
@pytest.mark.parametrize("capability", ["sm80", "sm90"])
def test_random_calls_of_the_cuda_kernels_equal_the_formula(capability: str, seeds: range) -> None:
    assert not (found := failures(seeds, f"emulated {capability}")), found


@over_seeds(INVALID_SEEDS, 250)
def test_random_invalid_calls_raise_an_error_of_the_documented_types(seeds: range) -> None:
    wrong = []
    for seed in seeds:
        problem, what = make_invalid(draw(seed), seed)
        try:
            with backend_of(problem), warnings.catch_warnings(action="ignore"):
                problem.ours()
        except (TypeError, ValueError, NotImplementedError):
            continue
        except Exception as error:
            wrong.append(f"seed {seed}, {what}: {type(error).__name__}: {error}; {problem}")
        else:
            wrong.append(f"seed {seed}, {what}: no error; {problem}")
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--backend", help="automatic, tiled, emulated sm80 or emulated sm90")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        problem = draw(seed, arguments.backend)
        print(f"seed {seed}: {problem}")
        print("\n".join(f"    {x}" for x in faults_of(problem)) or "    passes")
