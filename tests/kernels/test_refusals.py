"""A kernel for compute capability 9.0 that is given what it cannot do says so, and does nothing.

`jvp_attn` chooses other kernels there; see tests/jvp_attn/test_cuda_on_hopper.py.
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
from tests.kernels.dq_accum import SUMS
from tests.kernels.harness import READS, WRITES
from tests.kernels.reference import ROW_VECTORS
from tests.kernels.trial import Trial, trial

# One of each family.
HOPPER = [family.kernels[0].name for family in FAMILIES if family.arch == "sm90"]
THAT_SUM = [name for name in HOPPER if KERNELS[name].step == "backward"]
OF_QUERIES = [name for name in HOPPER if KERNELS[name].step == "forward_jvp_q"]

Change = Callable[[Any], None]

over_kernels = pytest.mark.parametrize("kernel", HOPPER)


@cache
def trial_of(kernel: str, **circumstances: str) -> Trial:
    """A problem that the kernel serves."""
    (family,) = (family for family in FAMILIES if KERNELS[kernel] in family.kernels)
    first_values = {name: values[0] for name, values in axes_of(family).items()}
    lengths = {"kernel": kernel, "queries": "tile", "keys": "tile", "heads": "4 over 2"}
    return trial({**first_values, **lengths, "sequences": "two", **circumstances})


def outputs_of(kernel: str, attempt: Trial) -> dict[str, Buffer]:
    return attempt.outputs_of(WRITES[KERNELS[kernel].step].split())


def assert_refused(kernel: str, why: str, change: Change, attempt: Trial | None = None) -> None:
    """Of a launch whose parameters were changed."""
    attempt = attempt or trial_of(kernel)
    outputs = outputs_of(kernel, attempt)
    before = {name: buffer.view.clone() for name, buffer in outputs.items()}
    launch = attempt.launch(outputs, tuple(outputs))
    change(launch.params)
    with pytest.raises(RuntimeError, match=f"kernel {kernel}: {why}"):
        launch.run(kernel)
    for name, buffer in outputs.items():
        torch.testing.assert_close(buffer.view, before[name], rtol=0, atol=0, equal_nan=True)


@over_kernels
def test_another_compute_capability(kernel: str) -> None:
    attempt = trial_of(kernel)
    outputs = outputs_of(kernel, attempt)
    params = attempt.launch(outputs, tuple(outputs)).params
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
def test_a_scale_that_is_not_positive(kernel: str, scale: float) -> None:
    def change(params: Any) -> None:
        params.softmax_scale = scale

    assert_refused(kernel, "softmax_scale is -?(0|nan).*must be positive", change)


@over_kernels
@pytest.mark.parametrize("name", ["head_dim", "head_dim_v"])
@pytest.mark.parametrize("beyond", [-4, 8, None], ids=["no multiple of 8", "too large", "none"])
def test_head_dims(kernel: str, name: str, beyond: int | None) -> None:
    padded = KERNELS[kernel].head_dim
    assert padded is not None
    head_dim = 0 if beyond is None else padded + beyond

    def change(params: Any) -> None:
        setattr(params, name, head_dim)

    assert_refused(kernel, f"{name} is {head_dim}; .* a multiple of 8, up to {padded}$", change)


@over_kernels
def test_a_mask(kernel: str) -> None:
    def change(params: Any) -> None:
        params.mask = emulator.load().Mask(0, 0, 0, 0, 0, 1)

    assert_refused(kernel, "there is a mask", change)


@over_kernels
@pytest.mark.parametrize("fault", ["address", "stride", "expanded"])
def test_rows_beside_multiples_of_16_bytes(kernel: str, fault: str) -> None:
    attempt = trial_of(kernel)
    step = KERNELS[kernel].step
    given = {name: x for name, x in attempt.inputs.items() if name in READS[step].split()}
    given |= outputs_of(kernel, attempt)
    for name, buffer in given.items():
        if name in (*ROW_VECTORS, *SUMS):
            continue

        def change(params: Any, name: str = name, buffer: Buffer = buffer) -> None:
            address, (batch, row, head, _) = buffer.address, buffer.view.stride()
            if fault == "address":
                address += 8
            else:
                row = 0 if fault == "expanded" else row + 4
            setattr(params, name, emulator.load().Tensor(address, batch, row, head))

        why = "must start" if fault == "address" else "has strides"
        assert_refused(kernel, f"{name} {why}", change, attempt)


@over_kernels
@pytest.mark.parametrize("rows", [0, 2**30])
def test_too_few_rows_and_too_many(kernel: str, rows: int) -> None:
    # Those that the kernel does not divide its work by.
    of_keys = KERNELS[kernel].step in ("backward", "backward_dkv", "jvp_backward_dkv")
    name = "seqlen_q" if of_keys else "seqlen_k"

    def change(params: Any) -> None:
        setattr(params, name, rows)

    assert_refused(kernel, f"a tensor has {rows} rows; it must have 1 to 1073741823$", change)


@pytest.mark.parametrize("kernel", THAT_SUM)
@pytest.mark.parametrize("name", SUMS)
def test_no_place_for_the_sums_of_gq(kernel: str, name: str) -> None:
    def change(params: Any) -> None:
        setattr(params, name, emulator.load().RowVector(0, 0, 0))

    assert_refused(kernel, "dq_accum and ds_row_sums must be given, filled with zeros$", change)


@pytest.mark.parametrize("kernel", THAT_SUM)
@pytest.mark.parametrize("fault", ["address", "batch", "head"])
def test_sums_of_gq_beside_multiples_of_16_bytes(kernel: str, fault: str) -> None:
    attempt = trial_of(kernel)

    def change(params: Any) -> None:
        sums = outputs_of(kernel, attempt)["dq_accum"]
        place = {"address": sums.address, "batch": sums.view.stride(0), "head": sums.view.stride(1)}
        place[fault] += 2
        params.dq_accum = emulator.load().RowVector(*place.values())

    why = "the heads of dq_accum must start at multiples of 16 bytes$"
    assert_refused(kernel, why, change, attempt)


@pytest.mark.parametrize("kernel", OF_QUERIES)
@pytest.mark.parametrize("name", ["tk", "tv"])
def test_tangents_that_a_kernel_does_not_read(kernel: str, name: str) -> None:
    attempt = trial_of(kernel)

    def change(params: Any) -> None:
        primal = attempt.inputs[name[1:]]
        tensor = emulator.load().Tensor(primal.address, *primal.view.stride()[:3])
        setattr(params, name, tensor)

    assert_refused(kernel, "keys or values have tangents", change, attempt)


@over_kernels
def test_the_stride_of_a_dimension_of_1_is_of_no_matter(kernel: str) -> None:
    attempt = trial_of(kernel, queries="1", keys="1", heads="1 over 1", sequences="one")
    odd = {
        name: buffer
        if name in ROW_VECTORS
        else Buffer(tuple(buffer.view.shape), buffer.view.dtype, (3, 0, 5, 1))
        for name, buffer in attempt.inputs.items()
    }
    for name, buffer in odd.items():
        buffer.view[...] = attempt.inputs[name].view
    attempt.inputs.update(odd)
    assert attempt.faults(attempt.run()) == []
