"""A kernel for compute capability 9.0 reports an unsupported problem, and writes nothing.

`jvp_attn` chooses other kernels for such problems.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from jvp_attn.backends.kernel_table import KERNELS
from tests.emulator import emulator
from tests.kernels.buffers import Buffer
from tests.kernels.cases import FAMILIES, axes_of
from tests.kernels.dq_accum import ACCUMULATORS
from tests.kernels.harness import READS, WRITES
from tests.kernels.kernel_case import KernelTest, kernel_test
from tests.kernels.reference import ROW_VECTORS

# One of each family.
SM90 = [family.kernels[0].name for family in FAMILIES if family.arch == "sm90"]
ATOMIC_DQ = [name for name in SM90 if KERNELS[name].step == "backward"]
Q_TANGENT_ONLY = [name for name in SM90 if KERNELS[name].step == "forward_jvp_q"]

Change = Callable[[Any], None]

over_kernels = pytest.mark.parametrize("kernel", SM90)


@cache
def supported(kernel: str, **config: str) -> KernelTest:
    """A problem that the kernel supports."""
    (family,) = (family for family in FAMILIES if KERNELS[kernel] in family.kernels)
    first_values = {name: values[0] for name, values in axes_of(family).items()}
    lengths = {"kernel": kernel, "queries": "tile", "keys": "tile", "heads": "4 over 2"}
    return kernel_test({**first_values, **lengths, "sequences": "two", **config})


def outputs_of(kernel: str, test: KernelTest) -> dict[str, Buffer]:
    return test.outputs_of(WRITES[KERNELS[kernel].step].split())


def assert_unsupported(
    kernel: str, why: str, change: Change, test: KernelTest | None = None
) -> None:
    """A launch with changed parameters raises, and leaves its outputs as they were."""
    test = test or supported(kernel)
    outputs = outputs_of(kernel, test)
    before = {name: buffer.view.clone() for name, buffer in outputs.items()}
    launch = test.launch(outputs, tuple(outputs))
    change(launch.params)
    with pytest.raises(RuntimeError, match=f"kernel {kernel}: {why}"):
        launch.run(kernel)
    for name, buffer in outputs.items():
        torch.testing.assert_close(buffer.view, before[name], rtol=0, atol=0, equal_nan=True)


@over_kernels
def test_compute_capability(kernel: str) -> None:
    test = supported(kernel)
    outputs = outputs_of(kernel, test)
    params = test.launch(outputs, tuple(outputs)).params
    machine = emulator.load()
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        why = "machine code for compute capability 9.0, and the device has {}.{}$"
        with (
            emulator.launching(machine, capability=capability),
            pytest.raises(RuntimeError, match=why.format(*capability)),
        ):
            machine.launch(kernel, params, 0)


@over_kernels
@pytest.mark.parametrize("scale", [0.0, -0.25, float("nan")])
def test_nonpositive_scale(kernel: str, scale: float) -> None:
    def change(params: Any) -> None:
        params.softmax_scale = scale

    assert_unsupported(kernel, "softmax_scale is -?(0|nan).*must be positive", change)


@over_kernels
@pytest.mark.parametrize("name", ["head_dim", "head_dim_v"])
@pytest.mark.parametrize("beyond", [-4, 8, None], ids=["no multiple of 8", "too large", "none"])
def test_head_dim(kernel: str, name: str, beyond: int | None) -> None:
    padded = KERNELS[kernel].head_dim
    assert padded is not None
    head_dim = 0 if beyond is None else padded + beyond

    def change(params: Any) -> None:
        setattr(params, name, head_dim)

    assert_unsupported(kernel, f"{name} is {head_dim}; .* a multiple of 8, up to {padded}$", change)


@over_kernels
def test_mask(kernel: str) -> None:
    def change(params: Any) -> None:
        params.mask = emulator.load().Mask(0, 0, 0, 0, 0, 1)

    assert_unsupported(kernel, "there is a mask", change)


@over_kernels
@pytest.mark.parametrize("fault", ["address", "stride", "expanded"])
def test_misaligned_rows(kernel: str, fault: str) -> None:
    test = supported(kernel)
    step = KERNELS[kernel].step
    given = {name: x for name, x in test.inputs.items() if name in READS[step].split()}
    given |= outputs_of(kernel, test)
    for name, buffer in given.items():
        if name in (*ROW_VECTORS, *ACCUMULATORS):
            continue

        def change(params: Any, name: str = name, buffer: Buffer = buffer) -> None:
            address, (batch, row, head, _) = buffer.address, buffer.view.stride()
            if fault == "address":
                address += 8
            else:
                row = 0 if fault == "expanded" else row + 4
            setattr(params, name, emulator.load().Tensor(address, batch, row, head))

        why = "must start" if fault == "address" else "has strides"
        assert_unsupported(kernel, f"{name} {why}", change, test)


@over_kernels
@pytest.mark.parametrize("rows", [0, 2**30])
def test_number_of_rows(kernel: str, rows: int) -> None:
    # The rows that the kernel loops over, in each block.
    of_keys = KERNELS[kernel].step in ("backward", "backward_dkv", "jvp_backward_dkv")
    name = "seqlen_q" if of_keys else "seqlen_k"

    def change(params: Any) -> None:
        setattr(params, name, rows)

    assert_unsupported(kernel, f"a tensor has {rows} rows; it must have 1 to 1073741823$", change)


@pytest.mark.parametrize("kernel", ATOMIC_DQ)
@pytest.mark.parametrize("name", ACCUMULATORS)
def test_missing_dq_accum(kernel: str, name: str) -> None:
    def change(params: Any) -> None:
        setattr(params, name, emulator.load().RowVector(0, 0, 0))

    assert_unsupported(kernel, "dq_accum and ds_row_sums must be given, filled with zeros$", change)


@pytest.mark.parametrize("kernel", ATOMIC_DQ)
@pytest.mark.parametrize("fault", ["address", "batch", "head"])
def test_misaligned_dq_accum(kernel: str, fault: str) -> None:
    test = supported(kernel)

    def change(params: Any) -> None:
        sums = outputs_of(kernel, test)["dq_accum"]
        place = {"address": sums.address, "batch": sums.view.stride(0), "head": sums.view.stride(1)}
        place[fault] += 2
        params.dq_accum = emulator.load().RowVector(*place.values())

    why = "the heads of dq_accum must start at multiples of 16 bytes$"
    assert_unsupported(kernel, why, change, test)


@pytest.mark.parametrize("kernel", Q_TANGENT_ONLY)
@pytest.mark.parametrize("name", ["tk", "tv"])
def test_tangents_of_keys_or_values(kernel: str, name: str) -> None:
    test = supported(kernel)

    def change(params: Any) -> None:
        primal = test.inputs[name[1:]]
        tensor = emulator.load().Tensor(primal.address, *primal.view.stride()[:3])
        setattr(params, name, tensor)

    assert_unsupported(kernel, "keys or values have tangents", change, test)


@over_kernels
def test_any_stride_is_supported_for_a_dimension_of_size_1(kernel: str) -> None:
    test = supported(kernel, queries="1", keys="1", heads="1 over 1", sequences="one")
    odd = {
        name: buffer
        if name in ROW_VECTORS
        else Buffer(tuple(buffer.view.shape), buffer.view.dtype, (3, 0, 5, 1))
        for name, buffer in test.inputs.items()
    }
    for name, buffer in odd.items():
        buffer.view[...] = test.inputs[name].view
    test.inputs.update(odd)
    assert test.faults(test.run()) == []
