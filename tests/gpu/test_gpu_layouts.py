"""Inputs with any strides, and tensors with more elements than 32 bits can index."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu.machines import Machine, assert_accurate, outputs_and_gradients
from tests.jvp_attn.attention_cases import Case
from tests.jvp_attn.test_layouts import over_layouts

DTYPE = torch.bfloat16


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    differing = [name for name, x in found.items() if not torch.equal(x, expected[name])]
    assert not differing


@over_layouts
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
def test_results_do_not_depend_on_the_layout_of_inputs(
    machine: Machine, head_dim: int, layout: Callable[[Tensor], Tensor]
) -> None:
    lengths = (machine.scaled(500), machine.scaled(700))
    case = Case(2, *lengths, 4, 2, head_dim, head_dim, causal=True, dtype=DTYPE)
    cotangents = {name: layout(x) for name, x in machine.cotangents(case).items() if x.ndim == 4}
    data = {name: layout(x) for name, x in machine.data(case).items()}
    dense = [
        {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        for tensors in (data, cotangents)
    ]
    assert_same(
        outputs_and_gradients(case.ours, data, cotangents),
        outputs_and_gradients(case.ours, *dense),
    )


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_results_do_not_depend_on_the_alignment_of_inputs(machine: Machine, offset: int) -> None:
    """A view may start at any element, without alignment for wide loads."""
    lengths = (machine.scaled(500), machine.scaled(700))
    case = Case(1, *lengths, 2, 1, 64, 64, dtype=DTYPE)
    data, cotangents = machine.data(case), machine.cotangents(case)
    shifted = {
        name: torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
        for name, x in data.items()
    }
    assert_same(
        outputs_and_gradients(case.ours, shifted, cotangents),
        outputs_and_gradients(case.ours, data, cotangents),
    )


@pytest.mark.parametrize("many", ["queries", "keys"])
def test_tensors_of_more_than_2_to_31_elements(machine: Machine, many: str) -> None:
    heads, many_rows, few_rows = machine.scaled(256), machine.scaled(65_600), machine.scaled(512)
    seqlen_q, seqlen_k = (many_rows, few_rows) if many == "queries" else (few_rows, many_rows)
    case = Case(1, seqlen_q, seqlen_k, heads, heads, 128, 128, dtype=DTYPE)
    if machine.device.type == "cuda":
        assert many_rows * heads * 128 > 2**31
        free, _ = torch.cuda.mem_get_info()
        if free < 72 * 2**30:
            pytest.skip(f"needs 72 GiB of GPU memory, {free / 2**30:.0f} GiB are free")

    generator = torch.Generator(machine.device).manual_seed(0)

    def new(seqlen: int, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(
            *(1, seqlen, heads, *shape), generator=generator, device=machine.device, dtype=dtype
        )

    data = {x: new(seqlen_q if "q" in x else seqlen_k, 128) for x in ("q", "k", "v")}
    data |= {f"t{x}": new(y.shape[1], 128) for x, y in data.items()}
    cotangents = {x: new(seqlen_q, 128) for x in ("out", "out_tangent")}
    cotangents |= {x: new(seqlen_q, dtype=torch.float32).transpose(1, 2) for x in ("lse", "mu")}
    found = outputs_and_gradients(case.ours, data, cotangents)

    one_head = Case(1, seqlen_q, seqlen_k, 1, 1, 128, 128, dtype=DTYPE)
    for head in (0, heads - 1):  # at both ends of memory

        def of_head(tensors: dict[str, Tensor], head: int = head) -> dict[str, Tensor]:
            return {
                name: x.narrow(1 if name in ("lse", "mu") else 2, head, 1)
                for name, x in tensors.items()
            }

        assert_accurate(of_head(found), one_head, of_head(data), of_head(cotangents))
