"""The cases include every kernel, and every combination of settings of their strength."""

from itertools import combinations

from jvp_attn.backends.kernel_table import KERNELS
from tests.kernels.cases import FAMILIES, axes_of, covering


def test_every_kernel_is_in_the_cases() -> None:
    cases = [case for family in FAMILIES for case in covering(axes_of(family), 1)]
    assert {case["kernel"] for case in cases} == KERNELS.keys()


def test_covering_has_every_combination_of_values() -> None:
    axes = {"a": "123", "b": "45", "c": "6789"}
    for strength in (1, 2, 3):
        cases = covering(axes, strength)
        for names in combinations(axes, strength):
            found = {tuple(case[name] for name in names) for case in cases}
            expected = 1
            for name in names:
                expected *= len(axes[name])
            assert len(found) == expected
