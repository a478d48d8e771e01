"""Hopper kernels are launched on compute capability 9.0 only, for problems that they support."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jvp_attn.backends import kernel_table
from jvp_attn.backends.cuda import CudaBackend
from jvp_attn.backends.kernel_report import report_problem
from jvp_attn.backends.kernel_table import KERNELS, sm90_head_dim
from jvp_attn.types import AttentionOptions, Inputs, Tangents
from tests.jvp_attn.attention_cases import (
    Case,
    assert_exact_to_two_roundings,
    outputs_and_gradients,
    part,
    projection,
    with_tangents,
    without_tangents,
)
from tests.jvp_attn.data_kinds import in_dtype, offset
from tests.jvp_attn.emulated_backend import emulated_backend
from tests.jvp_attn.kernel_recorder import Recorder
from tests.jvp_attn.packed_cases import PackedCase
from tests.jvp_attn.primitive_calls import PrimitiveCall, call_of

SHAPE = (2, 8, 4, 64)  # (batch, seqlen, heads, head_dim)
SCALE = 0.25


def tensor(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros; torch aligns them to 64 bytes."""
    return torch.zeros(shape, dtype=dtype)


def launched(
    capability: tuple[int, int] = (9, 0),
    *,
    names: Collection[str] = tuple(KERNELS),
    scale: float = SCALE,
    tangents: str = "qkv",
    **changed: Tensor,
) -> list[str]:
    """The kernels that forward JVP launches, on tensors of SHAPE except those given."""
    shapes = {name: changed.get(name, tensor()).shape for name in "qkv"}
    x = {name: changed.get(name, tensor(shapes[name])) for name in "qkv"}
    t = {
        name: changed.get(f"t{name}", tensor(shapes[name], x["q"].dtype))
        if name in tangents
        else None
        for name in "qkv"
    }
    recorder = Recorder(names)
    backend = CudaBackend(recorder, recorder.stream_of, lambda device: capability)
    inputs = Inputs(*x.values(), changed.get("mask"), None, None)
    options = AttentionOptions(scale, backend="cuda", return_lo=False)
    backend.forward_jvp(inputs, Tangents(*t.values(), None), options)
    return recorder.names


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize(
    ("head_dim", "padded"), [(8, 64), (64, 64), (72, sm90_head_dim(96)), (128, 128)]
)
def test_hopper_runs_its_own_kernels(
    head_dim: int, padded: int, dtype: torch.dtype, element: str
) -> None:
    x = tensor((2, 8, 4, head_dim), dtype)
    name = f"forward_jvp_{element}_d{padded}"
    assert launched(q=x, k=x, v=x) == [f"{name}_sm90"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_devices_run_the_general_kernels(capability: tuple[int, int]) -> None:
    assert launched(capability) == ["forward_jvp_bf16_d64"]


def test_a_build_without_hopper_kernels_runs_the_general_ones() -> None:
    older = [name for name in KERNELS if KERNELS[name].arch == "sm80"]
    assert launched(names=older) == ["forward_jvp_bf16_d64"]


def test_tangents_of_q_alone_have_their_own_kernel() -> None:
    assert launched(tangents="q") == ["forward_jvp_q_bf16_d64_sm90"]
    for tangents in ("k", "qv", "kv"):
        assert launched(tangents=tangents) == ["forward_jvp_bf16_d64_sm90"]


def strided(strides: tuple[int, ...], offset: int = 0) -> Tensor:
    return torch.zeros(40000, dtype=torch.bfloat16).as_strided(SHAPE, strides, offset)


@pytest.mark.parametrize(
    ("strides", "offset"),
    [
        ((4 * 8 * 64, 4 * 64, 64, 1), 4),
        ((4 * 8 * 68, 4 * 68, 68, 1), 0),
        ((4 * 8 * 64 + 4, 4 * 64, 64, 1), 0),
        ((0, 4 * 64, 64, 1), 0),
        ((4 * 64, 0, 64, 1), 0),
    ],
    ids=["address", "head stride", "batch stride", "expanded batch", "expanded rows"],
)
@pytest.mark.parametrize("name", ["q", "k", "v", "tq", "tk", "tv"])
def test_tensors_that_the_tma_cannot_load_run_the_general_kernels(
    name: str, strides: tuple[int, ...], offset: int
) -> None:
    assert launched(**{name: strided(strides, offset)}) == ["forward_jvp_bf16_d64"]


def test_the_stride_of_a_dimension_of_size_1_is_ignored() -> None:
    x = torch.zeros(4096, dtype=torch.bfloat16).as_strided((1, 8, 1, 64), (3, 64, 0, 1))
    assert launched(q=x, k=x, v=x) == ["forward_jvp_bf16_d64_sm90"]


@pytest.mark.parametrize("head_dims", [(60, 64), (64, 60)])
def test_head_dims_that_are_no_multiples_of_8_run_the_general_kernels(
    head_dims: tuple[int, int],
) -> None:
    q, v = (torch.zeros(2, 8, 4, 64, dtype=torch.bfloat16)[..., :d] for d in head_dims)
    assert launched(q=q, k=q, v=v, tq=q, tk=q, tv=v) == ["forward_jvp_bf16_d64"]


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_scales_that_are_not_positive_run_the_general_kernels(scale: float) -> None:
    assert launched(scale=scale) == ["forward_jvp_bf16_d64"]


def test_masks_run_the_general_kernels() -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert launched(mask=mask) == ["forward_jvp_bf16_d64_masked"]


def test_steps_with_and_without_hopper_kernels_can_be_mixed() -> None:
    without = [name for name in KERNELS if "tangent_only" not in name or "sm90" not in name]
    x = tensor((2, 8, 4, 256))
    assert launched(names=without, q=x, k=x, v=x) == [
        "forward_bf16_d256_sm90",
        "tangent_only_bf16_d256",
    ]


def test_the_tma_is_given_the_total_length_of_packed_tensors() -> None:
    recorder = Recorder()
    backend = CudaBackend(recorder, recorder.stream_of, lambda device: (9, 0))
    q, k = tensor((1, 30, 4, 64)), tensor((1, 50, 4, 64))
    ends_q, ends_k = torch.tensor([0, 10, 30]).int(), torch.tensor([0, 40, 50]).int()
    options = AttentionOptions(SCALE, backend="cuda", max_seqlens=(20, 40))
    backend.forward(Inputs(q, k, k, None, ends_q, ends_k), options)
    fields = recorder.fields
    assert (fields["total_q"], fields["total_k"]) == (30, 50)
    assert (fields["seqlen_q"], fields["seqlen_k"]) == (20, 40)


# ----------------------------------------------------------------------------
# The backward with atomic accumulation of dQ

ONE_PASS = ["preprocess_bf16", "backward_bf16_d128_sm90", "bwd_postprocess_bf16"]
TWO_KERNELS = ["preprocess_bf16", "backward_dq_bf16_d128_sm90", "backward_dkv_bf16_d128_sm90"]
GENERAL_KERNELS = ["preprocess_bf16", "backward_dq_bf16_d128", "backward_dkv_bf16_d128"]


def backward_call(
    head_dim: int = 128, *, deterministic: bool = False, **changes: Any
) -> PrimitiveCall:
    case = Case(head_dim=head_dim, head_dim_v=head_dim, dtype=torch.bfloat16, **changes)
    call = call_of(case)
    return replace(call, options=replace(call.options, deterministic=deterministic))


def launched_backward(
    call: PrimitiveCall,
    capability: tuple[int, int] = (9, 0),
    names: Collection[str] = tuple(KERNELS),
) -> list[str]:
    recorder = Recorder(names)
    call.backward(CudaBackend(recorder, recorder.stream_of, lambda device: capability))
    return recorder.names


def test_the_backward_is_deterministic_by_default() -> None:
    assert launched_backward(backward_call(deterministic=True)) == TWO_KERNELS
    assert launched_backward(backward_call(deterministic=False)) == ONE_PASS


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_on_other_devices_the_backward_is_always_deterministic(capability: tuple[int, int]) -> None:
    assert launched_backward(backward_call(), capability) == GENERAL_KERNELS


@pytest.mark.parametrize("missing", ["backward_bf16_d128_sm90", "bwd_postprocess_bf16"])
def test_a_build_without_the_atomic_backward_is_deterministic(missing: str) -> None:
    names = [name for name in KERNELS if name != missing]
    assert launched_backward(backward_call(), names=names) == TWO_KERNELS


def test_use_deterministic_algorithms_makes_the_backward_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert launched_backward(backward_call()) == TWO_KERNELS
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_the_gradient_of_q_the_backward_is_deterministic() -> None:
    needs = (False, True, True, False)
    assert launched_backward(replace(backward_call(), needs=2 * needs)) == TWO_KERNELS


def test_problems_outside_the_hopper_kernels_are_deterministic() -> None:
    masked = [name if "preprocess" in name else f"{name}_masked" for name in GENERAL_KERNELS]
    assert launched_backward(backward_call(mask="boolean")) == masked
    expanded = tensor((1, 1, 1, 128)).expand(backward_call().cotangents.out.shape)
    call = backward_call().changed("cotangents", out=expanded)
    assert launched_backward(call) == GENERAL_KERNELS
    for head_dim, kernel in ((256, "bf16_d256"), (64, "bf16_d64_sm90")):
        dq_and_dkv = ["preprocess_bf16", f"backward_dq_{kernel}", f"backward_dkv_{kernel}"]
        assert launched_backward(backward_call(head_dim)) == dq_and_dkv


def test_the_jvp_backward_is_always_deterministic() -> None:
    recorder = Recorder()
    backend = CudaBackend(recorder, recorder.stream_of, lambda device: (9, 0))
    backward_call().jvp_backward(backend)
    assert recorder.names == [
        "preprocess_bf16",
        "jvp_backward_dq_bf16_d128_sm90",
        "jvp_backward_dkv_bf16_d128_sm90",
    ]


class AccumulatorChecker(Recorder):
    """Records the strides of the accumulators and checks that these are 0 at the launch."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: dict[str, tuple[int, ...]] = {}

    def launch(self, name: str, params: Any, stream: int) -> None:
        super().launch(name, params, stream)
        if not name.startswith("backward"):
            return
        for place in ("dq_accum", "ds_row_sums"):
            address, *strides = self.fields[place]
            of_batch, of_head = self.strides[place] = tuple(strides)
            count = self.fields["batch"] * of_batch or self.fields["heads"] * of_head
            assert not any((ctypes.c_float * count).from_address(address))


def strides_of_accumulators(call: PrimitiveCall) -> dict[str, tuple[int, ...]]:
    recorder = AccumulatorChecker()
    call.backward(CudaBackend(recorder, recorder.stream_of, lambda device: (9, 0)))
    return recorder.strides


@pytest.mark.parametrize(("seqlen", "rows"), [(1, 128), (128, 128), (129, 256)])
@pytest.mark.parametrize("head_dim", [72, 104])
def test_accumulators_are_zeroed_and_padded_to_whole_tiles(
    seqlen: int, rows: int, head_dim: int
) -> None:
    assert strides_of_accumulators(backward_call(head_dim, seqlen_q=seqlen, heads=4)) == {
        "dq_accum": (4 * rows * head_dim, rows * head_dim),
        "ds_row_sums": (4 * rows, rows),
    }


def test_accumulators_of_each_packed_sequence_are_padded_to_whole_tiles() -> None:
    # 203 rows and three sequences, each of which starts at a multiple of 128.
    dims = {"head_dim": 72, "head_dim_v": 72, "dtype": torch.bfloat16}
    call = call_of(PackedCase((130, 0, 70), (9, 5, 7), beyond=3, **dims))
    call = replace(call, options=replace(call.options, deterministic=False))
    assert strides_of_accumulators(call) == {"dq_accum": (0, 512 * 72), "ds_row_sums": (0, 512)}


# ----------------------------------------------------------------------------
# Without products of parts of swizzle atoms


@pytest.fixture
def whole_swizzle_atoms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "PARTIAL_SWIZZLE_ATOMS", False)


@pytest.mark.usefixtures("whole_swizzle_atoms")
@pytest.mark.parametrize(("head_dim", "padded"), [(64, 64), (72, 128), (96, 128), (104, 128)])
def test_whole_swizzle_atoms_have_multiples_of_64_columns(head_dim: int, padded: int) -> None:
    x = tensor((2, 8, 4, head_dim))
    for tangents, step in (("qkv", "forward_jvp"), ("q", "forward_jvp_q")):
        assert launched(q=x, k=x, v=x, tangents=tangents) == [f"{step}_bf16_d{padded}_sm90"]


@pytest.mark.usefixtures("whole_swizzle_atoms")
def test_whole_swizzle_atoms_in_the_backward() -> None:
    assert launched_backward(backward_call(96)) == ONE_PASS
    assert launched_backward(backward_call(96, deterministic=True)) == TWO_KERNELS
    of_96 = [name.replace("d128", "d96") for name in GENERAL_KERNELS]
    assert launched_backward(backward_call(96), (8, 0)) == of_96
    assert reported("backward", 96, (9, 0)) == TWO_KERNELS


@pytest.mark.usefixtures("whole_swizzle_atoms")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_whole_swizzle_atoms_serve_head_dim_96(packed: bool) -> None:
    dims = {"head_dim": 96, "head_dim_v": 72, "heads": 2}
    case: Case | PackedCase = Case(1, 70, 150, heads_k=1, causal=True, **dims)
    if packed:
        case = PackedCase((70, 0, 33, 5), (80, 10, 0, 20), beyond=3, heads_k=2, **dims)
    data = in_dtype(offset(case.data()), torch.bfloat16)
    through = projection(dtype=torch.bfloat16)
    with emulated_backend((9, 0)):
        for names, evaluate in ((data, with_tangents), ("qkv", without_tangents)):
            found, exact = (
                outputs_and_gradients(f, part(x, names), evaluate=evaluate, through=through)
                for f, x in ((case.ours, data), (case.naive, in_dtype(data, torch.float64)))
            )
            assert_exact_to_two_roundings(found, exact)


# ----------------------------------------------------------------------------
# The report of the kernels for a problem


def reported(primitive: str, head_dim: int, capability: tuple[int, int]) -> list[str]:
    reports = report_problem(torch.bfloat16, (2, 8, 4, head_dim), capability=capability)
    (kernels,) = (report.kernels for report in reports if report.primitive == primitive)
    return [kernel.name for kernel in kernels]


def test_the_report_names_hopper_kernels_only_on_hopper() -> None:
    assert reported("forward_jvp", 64, (9, 0)) == ["forward_jvp_bf16_d64_sm90"]
    assert reported("forward_jvp", 64, (10, 0)) == ["forward_jvp_bf16_d64"]
    assert reported("forward_jvp", 60, (9, 0)) == ["forward_jvp_bf16_d64"]
