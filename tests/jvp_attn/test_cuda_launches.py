"""Which kernels the CUDA backend launches, recorded by an extension that computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from jvp_attn.backends import tiled
from jvp_attn.backends.cuda import CudaBackend
from tests.jvp_attn.attention_cases import Case, assert_close, named
from tests.jvp_attn.kernel_recorder import STREAM, Recorder
from tests.jvp_attn.packed_cases import PackedCase
from tests.jvp_attn.primitive_calls import BF16, bf16_case, bf16_packed_case, call_of


@pytest.mark.parametrize(("dtype", "element"), [(BF16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize(("head_dim", "padded"), [(3, 64), (72, 96), (128, 128), (200, 256)])
def test_dtype_and_head_dim_choose_the_kernel(
    head_dim: int, padded: int, dtype: torch.dtype, element: str, cuda: CudaBackend, recorder: Any
) -> None:
    call_of(bf16_case(head_dim, dtype=dtype)).forward(cuda)
    assert recorder.names == [f"forward_{element}_d{padded}"]


def test_forward_jvp_is_one_launch_and_two_at_head_dim_256(
    cuda: CudaBackend, recorder: Recorder
) -> None:
    call_of(bf16_case(128)).forward_jvp(cuda)
    call_of(bf16_case(256), return_lo=False).forward_jvp(cuda)
    assert recorder.names == [
        "forward_jvp_bf16_d128",
        "forward_bf16_d256",
        "tangent_only_bf16_d256",
    ]
    # The second kernel reads all results of the first.
    first, second = (fields for _, fields, _ in recorder.launches[1:])
    assert "out_lo" in first
    assert first == second


def test_each_backward_is_three_launches(cuda: CudaBackend, recorder: Recorder) -> None:
    call_of(bf16_case()).backward(cuda)
    call_of(bf16_case()).jvp_backward(cuda)
    assert recorder.steps == [
        *("preprocess", "backward_dq", "backward_dkv"),
        *("preprocess", "jvp_backward_dq", "jvp_backward_dkv"),
    ]


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masked_problems_launch_the_masked_kernels(
    kind: str, cuda: CudaBackend, recorder: Recorder
) -> None:
    call_of(bf16_case(mask=kind)).all_four(cuda)
    call_of(bf16_case(256, mask=kind)).forward_jvp(cuda)
    assert recorder.names == [
        "forward_bf16_d64_masked",
        "forward_jvp_bf16_d64_masked",
        *("preprocess_bf16", "backward_dq_bf16_d64_masked", "backward_dkv_bf16_d64_masked"),
        "preprocess_bf16",
        "jvp_backward_dq_bf16_d64_masked",
        "jvp_backward_dkv_bf16_d64_masked",
        *("forward_bf16_d256_masked", "tangent_only_bf16_d256_masked"),
    ]


def test_all_kernels_of_a_primitive_run_on_the_current_stream(
    cuda: CudaBackend, recorder: Recorder
) -> None:
    call_of(bf16_case()).backward(cuda)
    assert [stream for *_, stream in recorder.launches] == 3 * [STREAM]
    assert recorder.streams_of == [torch.device("cpu")]


# ----------------------------------------------------------------------------
# Problems without a kernel are computed by the backend `tiled`


def assert_tiled(of: Callable[[Any], Any], cuda: CudaBackend, recorder: Recorder) -> None:
    assert_close(named(of(cuda)), named(of(tiled)), tolerance=0)
    assert recorder.names == []


@pytest.mark.parametrize("mask", [None, "boolean"])
def test_the_jvp_backward_above_head_dim_128_is_tiled(
    mask: str | None, cuda: CudaBackend, recorder: Recorder
) -> None:
    assert_tiled(call_of(bf16_case(136, mask=mask)).jvp_backward, cuda, recorder)


def test_tangents_of_masks_and_their_gradients_are_tiled(
    cuda: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(bf16_case(mask="additive", with_tangent="qm"))
    assert_tiled(call.forward_jvp, cuda, recorder)
    assert_tiled(call.jvp_backward, cuda, recorder)


@pytest.mark.parametrize(
    ("method", "place"), [("backward", 3), ("jvp_backward", 3), ("jvp_backward", 7)]
)
def test_gradients_of_masks_are_tiled(
    method: str, place: int, cuda: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(bf16_case(mask="additive", mask_dims="b.qk"))
    call = replace(call, needs=tuple(i == place for i in range(8)))
    assert_tiled(getattr(call, method), cuda, recorder)


@pytest.mark.parametrize(
    "case",
    [
        bf16_case(batch=0),
        bf16_case(heads=0, heads_k=0),
        bf16_case(heads=0, heads_k=2),
        bf16_case(seqlen_q=0),
        bf16_case(seqlen_k=0),
        bf16_packed_case(seqlens_q=(), seqlens_k=(), beyond=3),
        bf16_packed_case(seqlens_q=(0, 0), seqlens_k=(4, 2)),
    ],
    ids=[
        *("no batch", "no heads", "no heads of queries", "no queries", "no keys"),
        *("no sequences", "sequences without queries"),
    ],
)
def test_an_empty_problem_is_computed_without_kernels(
    case: Case | PackedCase, cuda: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(case, return_lo=False)
    assert_close(named(call.all_four(cuda)), named(call.all_four(tiled)), tolerance=0)
    assert recorder.names == []
