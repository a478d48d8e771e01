"""Which pointers, strides and numbers the CUDA backend passes to the kernels."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch

from jvp_attn.backends.cuda import CudaBackend
from tests.jvp_attn.attention_cases import Case
from tests.jvp_attn.kernel_recorder import Params, Recorder
from tests.jvp_attn.primitive_calls import BF16, bf16_case, bf16_packed_case, call_of

GRADIENTS = {f"grad_{t}{x}" for t in ("", "t") for x in "qkv"}


def tensors_in(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: x for name, x in fields.items() if isinstance(x, tuple)}


def numbers_in(fields: dict[str, Any]) -> dict[str, float]:
    return {name: x for name, x in fields.items() if not isinstance(x, tuple)}


def test_sizes_and_scale_are_passed(cuda: CudaBackend, recorder: Recorder) -> None:
    case = Case(2, 5, 7, heads=4, heads_k=2, causal=True, dtype=torch.float16)
    call_of(case).forward(cuda)
    assert numbers_in(recorder.fields) == {
        "batch": 2,
        "seqlen_q": 5,
        "seqlen_k": 7,
        "total_q": 5,
        "total_k": 7,
        "heads": 4,
        "heads_k": 2,
        "head_dim": 3,
        "head_dim_v": 6,
        "softmax_scale": 0.25,
        "causal": 1,
    }


def test_causal_is_aligned_as_flash_attn_or_torch_aligns_it(
    cuda: CudaBackend, recorder: Recorder
) -> None:
    for case, number in (
        (bf16_case(), 0),
        (bf16_case(causal=True), 1),
        (bf16_case(causal=True, torchs_interface=True), 2),
    ):
        call_of(case).all_four(cuda)
        assert {fields["causal"] for _, fields, _ in recorder.launches} == {number}
        recorder.launches.clear()


def test_inputs_are_passed_with_their_strides(cuda: CudaBackend, recorder: Recorder) -> None:
    call = call_of(bf16_case())
    q, k, v, *_ = call.inputs
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], 1)[:, 1 : 1 + k.shape[1]]
    v = v[:1].expand(v.shape)
    call.changed("inputs", q=q, k=k, v=v).forward(cuda)
    for name, x in {"q": q, "k": k, "v": v}.items():
        assert recorder.fields[name] == (x.data_ptr(), *x.stride()[:3]), name
    assert recorder.fields["v"][1] == 0


def test_only_a_strided_last_dimension_is_copied(cuda: CudaBackend, recorder: Recorder) -> None:
    call = call_of(bf16_case())
    q, k, *_ = call.inputs
    call.changed("inputs", q=q.mT.contiguous().mT).forward(cuda)
    assert recorder.fields["q"][1:] == q.stride()[:3]
    assert recorder.fields["k"][0] == k.data_ptr()

    call.changed("cotangents", lse=torch.ones(()).expand(2, 4, 5)).backward(cuda)
    assert recorder.fields["grad_lse"][1:] == (4 * 5, 5)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bool, 1), (BF16, 2), (torch.float32, 3)], ids=str
)
def test_a_mask_is_passed_with_its_kind_and_strides(
    dtype: torch.dtype, kind: int, cuda: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(bf16_case())
    mask = torch.zeros(2, 4, 7, 5, dtype=dtype).mT  # even the last dimension may be strided
    call.changed("inputs", mask=mask).all_four(cuda)
    found = [fields["mask"] for _, fields, _ in recorder.launches]
    assert found == len(found) * [(mask.data_ptr(), 140, 35, 1, 5, kind, 2, 1)]


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((1, 1, 5, 7), (0, 0, 7, 1)),
        ((2, 1, 1, 7), (7, 0, 0, 1)),
        ((1, 4, 5, 1), (0, 5, 1, 0)),
        ((1, 1, 1, 1), (0, 0, 0, 0)),
    ],
    ids=str,
)
def test_where_a_mask_does_not_vary_its_stride_is_0(
    shape: tuple[int, ...], strides: tuple[int, ...], cuda: CudaBackend, recorder: Recorder
) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    call_of(bf16_case()).changed("inputs", mask=mask).forward(cuda)
    assert recorder.fields["mask"][:6] == (mask.data_ptr(), *strides, 1)
    # A mask that the caller expanded is not copied.
    expanded = mask.expand(2, 4, 5, 7)
    call_of(bf16_case()).changed("inputs", mask=expanded).forward(cuda)
    assert recorder.fields["mask"][:6] == (mask.data_ptr(), *strides, 1)


def test_how_many_examples_share_an_entry_of_a_mask_is_passed(
    cuda: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(bf16_case(batch=12))
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    call = replace(call, options=replace(call.options, mask_group=3))
    call.changed("inputs", mask=mask).all_four(cuda)
    found = [fields["mask"] for _, fields, _ in recorder.launches]
    assert found == len(found) * [(mask.data_ptr(), 7, 0, 0, 1, 1, 2, 3)]


def test_absent_tensors_are_not_passed(cuda: CudaBackend, recorder: Recorder) -> None:
    call_of(bf16_case(with_tangent="q"), return_lo=False).forward_jvp(cuda)
    absent = {"tk", "tv", "out_lo", "tout_lo", "lse_lo", "grad_out", "mask", "cu_seqlens_q"}
    assert not absent & recorder.fields.keys()
    assert {"tq", "out", "tout", "lse", "mu"} <= recorder.fields.keys()


def test_all_given_tensors_are_passed(cuda: CudaBackend, recorder: Recorder) -> None:
    call = call_of(bf16_case())
    call.jvp_backward(cuda)
    given = {
        **{name: x for name, x in call.inputs._asdict().items() if name in "qkv"},
        **{f"t{name}": x for name, x in call.tangents._asdict().items() if name in "qkv"},
        **call.outputs._asdict(),
        **{f"grad_{name}": x for name, x in call.cotangents._asdict().items()},
    }
    found = tensors_in(recorder.fields)
    assert found.keys() == given.keys() | GRADIENTS | {"beta", "delta"}
    for name, x in given.items():
        assert found[name] == (x.data_ptr(), *x.stride()[:-1]), name


# ----------------------------------------------------------------------------
# Packed sequences


def test_packed_sequences_are_a_batch_without_a_stride(
    cuda: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(
        bf16_packed_case(seqlens_q=(3, 5, 1), seqlens_k=(6, 2, 4), beyond=2, causal=True)
    )
    call.all_four(cuda)
    sizes = {"batch": 3, "seqlen_q": 5, "seqlen_k": 6, "causal": 1}
    for name, fields, _ in recorder.launches:
        assert sizes.items() <= fields.items(), name
        assert fields["cu_seqlens_q"] == call.inputs.cu_seqlens_q.data_ptr()
        assert fields["cu_seqlens_k"] == call.inputs.cu_seqlens_k.data_ptr()
        strides = {x: tensor[1:] for x, tensor in tensors_in(fields).items()}
        assert {stride[0] for stride in strides.values()} == {0}, name
        assert strides["q"][1:] == (4 * 64, 64)
        assert strides["lse"][1:] == (3 + 5 + 1 + 2,)


def test_max_seqlens_may_be_longer_than_all_tokens(cuda: CudaBackend, recorder: Recorder) -> None:
    call = call_of(bf16_packed_case(seqlens_q=(3, 5), seqlens_k=(6, 2)))
    options = replace(call.options, max_seqlens=(1000, 7))
    replace(call, options=options).forward(cuda)
    assert (recorder.fields["seqlen_q"], recorder.fields["seqlen_k"]) == (3 + 5, 7)


def test_cu_seqlens_of_any_stride_are_passed_as_the_kernels_read_them(
    cuda: CudaBackend, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    def launch(name: str, params: Params, stream: int) -> None:
        for address in (params.cu_seqlens_q, params.cu_seqlens_k):
            read.append(list((ctypes.c_int32 * 3).from_address(address)))

    monkeypatch.setattr(recorder, "launch", launch)
    call = call_of(bf16_packed_case(seqlens_q=(3, 5), seqlens_k=(6, 2)))
    both = torch.stack(call.inputs[4:6], dim=1)
    call.changed("inputs", cu_seqlens_q=both[:, 0], cu_seqlens_k=both[:, 1]).forward(cuda)
    assert read == [[0, 3, 8], [0, 6, 8]]
