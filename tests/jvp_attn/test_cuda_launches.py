"""What the maps of the CUDA backend hand to the kernels, seen by an extension that only records."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jvp_attn.backends import tiled
from jvp_attn.backends.cuda import CudaBackend
from tests.jvp_attn.attention_cases import Case, assert_close, named
from tests.jvp_attn.kernel_recorder import STREAM, Params, Recorder
from tests.jvp_attn.primitive_calls import call_of
from tests.jvp_attn.packed_cases import PackedCase

BF16 = torch.bfloat16
RESULTS_OF_ROWS = {"out", "tout", "lse", "mu"}
GRADIENTS = {f"grad_{t}{x}" for t in ("", "t") for x in "qkv"}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def maps(recorder: Recorder) -> CudaBackend:
    return CudaBackend(recorder, recorder.stream_of)


def case_of(head_dim: int = 64, **changes: Any) -> Case:
    return Case(head_dim=head_dim, head_dim_v=head_dim, **{"dtype": BF16, **changes})


def packed_case(**changes: Any) -> PackedCase:
    return PackedCase(head_dim=64, head_dim_v=64, dtype=BF16, **changes)


def steps_of(recorder: Recorder) -> list[str]:
    """The launched kernels without the dtype and the head dim."""
    return [name.partition("_bf16")[0] for name in recorder.names]


def tensors_in(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: x for name, x in fields.items() if isinstance(x, tuple)}


def numbers_in(fields: dict[str, Any]) -> dict[str, float]:
    return {name: x for name, x in fields.items() if not isinstance(x, tuple)}


# ----------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize(("dtype", "element"), [(BF16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize(("head_dim", "padded"), [(3, 64), (72, 96), (128, 128), (200, 256)])
def test_dtype_and_head_dim_choose_the_kernel(
    head_dim: int, padded: int, dtype: torch.dtype, element: str, maps: CudaBackend, recorder: Any
) -> None:
    call_of(case_of(head_dim, dtype=dtype)).forward(maps)
    assert recorder.names == [f"forward_{element}_d{padded}"]


def test_forward_with_tangent_is_one_launch_and_at_head_dim_256_two(
    maps: CudaBackend, recorder: Recorder
) -> None:
    call_of(case_of(128)).forward_jvp(maps)
    call_of(case_of(256), return_lo=False).forward_jvp(maps)
    assert recorder.names == [
        "forward_jvp_bf16_d128",
        "forward_bf16_d256",
        "tangent_only_bf16_d256",
    ]
    # The second step continues from all that the first has computed.
    first, second = (fields for _, fields, _ in recorder.launches[1:])
    assert "out_lo" in first
    assert first == second


def test_backward_maps_are_three_launches(maps: CudaBackend, recorder: Recorder) -> None:
    call_of(case_of()).backward(maps)
    call_of(case_of()).jvp_backward(maps)
    assert steps_of(recorder) == [
        *("preprocess", "backward_dq", "backward_dkv"),
        *("preprocess", "jvp_backward_dq", "jvp_backward_dkv"),
    ]


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_with_a_mask_the_kernels_are_those_that_read_one(
    kind: str, maps: CudaBackend, recorder: Recorder
) -> None:
    call_of(case_of(mask=kind)).all_four(maps)
    call_of(case_of(256, mask=kind)).forward_jvp(maps)
    assert recorder.names == [
        "forward_bf16_d64_masked",
        "forward_jvp_bf16_d64_masked",
        *("preprocess_bf16", "backward_dq_bf16_d64_masked", "backward_dkv_bf16_d64_masked"),
        "preprocess_bf16",
        "jvp_backward_dq_bf16_d64_masked",
        "jvp_backward_dkv_bf16_d64_masked",
        *("forward_bf16_d256_masked", "tangent_only_bf16_d256_masked"),
    ]


def test_all_kernels_of_a_map_run_on_the_current_stream_of_the_device(
    maps: CudaBackend, recorder: Recorder
) -> None:
    call_of(case_of()).backward(maps)
    assert [stream for *_, stream in recorder.launches] == 3 * [STREAM]
    assert recorder.streams_of == [torch.device("cpu")]


# ----------------------------------------------------------------------------
# What has no kernel is tiled


def assert_tiled(of: Callable[[Any], Any], maps: CudaBackend, recorder: Recorder) -> None:
    assert_close(named(of(maps)), named(of(tiled)), tolerance=0)
    assert recorder.names == []


@pytest.mark.parametrize("mask", [None, "boolean"])
def test_gradients_through_tangents_above_head_dim_128(
    mask: str | None, maps: CudaBackend, recorder: Recorder
) -> None:
    assert_tiled(call_of(case_of(136, mask=mask)).jvp_backward, maps, recorder)


def test_tangents_of_masks_and_gradients_through_them(
    maps: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(case_of(mask="additive", with_tangent="qm"))
    assert_tiled(call.forward_jvp, maps, recorder)
    assert_tiled(call.jvp_backward, maps, recorder)


@pytest.mark.parametrize(
    ("method", "place"), [("backward", 3), ("jvp_backward", 3), ("jvp_backward", 7)]
)
def test_gradients_of_masks(method: str, place: int, maps: CudaBackend, recorder: Recorder) -> None:
    call = call_of(case_of(mask="additive", mask_dims="b.qk"))
    call = replace(call, needs=tuple(i == place for i in range(8)))
    assert_tiled(getattr(call, method), maps, recorder)


# ----------------------------------------------------------------------------
# What they are given


def test_numbers(maps: CudaBackend, recorder: Recorder) -> None:
    case = Case(2, 5, 7, heads=4, heads_k=2, causal=True, dtype=torch.float16)
    call_of(case).forward(maps)
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
    maps: CudaBackend, recorder: Recorder
) -> None:
    for case, number in (
        (case_of(), 0),
        (case_of(causal=True), 1),
        (case_of(causal=True, torchs_interface=True), 2),
    ):
        call_of(case).all_four(maps)
        assert {fields["causal"] for _, fields, _ in recorder.launches} == {number}
        recorder.launches.clear()


def test_inputs_are_passed_with_their_strides(maps: CudaBackend, recorder: Recorder) -> None:
    call = call_of(case_of())
    q, k, v, *_ = call.inputs
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], 1)[:, 1 : 1 + k.shape[1]]
    v = v[:1].expand(v.shape)
    call.changed("inputs", q=q, k=k, v=v).forward(maps)
    for name, x in {"q": q, "k": k, "v": v}.items():
        assert recorder.fields[name] == (x.data_ptr(), *x.stride()[:3]), name
    assert recorder.fields["v"][1] == 0


def test_only_a_strided_last_dimension_is_copied(maps: CudaBackend, recorder: Recorder) -> None:
    call = call_of(case_of())
    q, k, *_ = call.inputs
    call.changed("inputs", q=q.mT.contiguous().mT).forward(maps)
    assert recorder.fields["q"][1:] == q.stride()[:3]
    assert recorder.fields["k"][0] == k.data_ptr()

    call.changed("cotangents", lse=torch.ones(()).expand(2, 4, 5)).backward(maps)
    assert recorder.fields["grad_lse"][1:] == (4 * 5, 5)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bool, 1), (BF16, 2), (torch.float32, 3)], ids=str
)
def test_a_mask_is_passed_with_its_kind_and_strides(
    dtype: torch.dtype, kind: int, maps: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(case_of())
    mask = torch.zeros(2, 4, 7, 5, dtype=dtype).mT  # even the last dimension may be strided
    call.changed("inputs", mask=mask).all_four(maps)
    found = [fields["mask"] for _, fields, _ in recorder.launches]
    assert found == len(found) * [(mask.data_ptr(), 140, 35, 1, 5, kind)]


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
    shape: tuple[int, ...], strides: tuple[int, ...], maps: CudaBackend, recorder: Recorder
) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    call_of(case_of()).changed("inputs", mask=mask).forward(maps)
    assert recorder.fields["mask"] == (mask.data_ptr(), *strides, 1)
    # What the caller has expanded is not copied either.
    expanded = mask.expand(2, 4, 5, 7)
    call_of(case_of()).changed("inputs", mask=expanded).forward(maps)
    assert recorder.fields["mask"] == (mask.data_ptr(), *strides, 1)


def test_what_is_absent_is_not_passed(maps: CudaBackend, recorder: Recorder) -> None:
    call_of(case_of(with_tangent="q"), return_lo=False).forward_jvp(maps)
    absent = {"tk", "tv", "out_lo", "tout_lo", "grad_out", "mask", "cu_seqlens_q"}
    assert not absent & recorder.fields.keys()
    assert {"tq"} | RESULTS_OF_ROWS <= recorder.fields.keys()


def test_all_that_is_there_is_passed(maps: CudaBackend, recorder: Recorder) -> None:
    call = call_of(case_of())
    call.jvp_backward(maps)
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


def test_gradients_of_tangents_that_are_not_needed_are_not_computed(
    maps: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(case_of())
    needs = (*call.needs[:4], False, True, False, False)
    _, gradients = replace(call, needs=needs).jvp_backward(maps)
    assert [name for name, x in gradients._asdict().items() if x is not None] == ["k"]
    assert recorder.fields["grad_tk"][0] == gradients.k.data_ptr()
    assert not {"grad_tq", "grad_tv"} & recorder.fields.keys()


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_only_gradients_that_are_needed_are_returned(needed: str, maps: CudaBackend) -> None:
    call = call_of(case_of(mask="additive"))
    needs = tuple(name == needed for name in ("q", "k", "v", "mask"))
    call = replace(call, needs=(*needs, *needs))
    gradients, tangent_gradients = call.jvp_backward(maps)
    for found in (call.backward(maps), gradients, tangent_gradients):
        assert [name for name, x in found._asdict().items() if x is not None] == [needed]


def test_residuals_are_returned_if_asked_for(maps: CudaBackend, recorder: Recorder) -> None:
    *_, out_lo, tout_lo = call_of(case_of()).forward_jvp(maps)
    assert recorder.fields["out_lo"][0] == out_lo.data_ptr()
    assert recorder.fields["tout_lo"][0] == tout_lo.data_ptr()
    for head_dim in (64, 256):
        outputs = call_of(case_of(head_dim), return_lo=False).forward_jvp(maps)
        assert outputs.out_lo is None
        assert outputs.tout_lo is None


def test_residuals_that_are_missing_are_computed_anew(
    maps: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(case_of())
    call.changed("outputs", out_lo=None).backward(maps)
    assert recorder.names[0] == "forward_bf16_d64"
    of_forward = recorder.launches[0][1]
    assert recorder.fields["out"] == of_forward["out"]
    assert recorder.fields["out_lo"] == of_forward["out_lo"]

    recorder.launches.clear()
    call.changed("outputs", tout_lo=None).jvp_backward(maps)
    assert recorder.names[0] == "forward_jvp_bf16_d64"
    of_forward = recorder.launches[0][1]
    for name in ("out", "tout", "out_lo", "tout_lo"):
        assert recorder.fields[name] == of_forward[name]


def test_residuals_that_nothing_reads_are_not_computed(
    maps: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(case_of())
    without_los = call.changed("outputs", out_lo=None, tout_lo=None)
    without_los.changed("cotangents", out=None).backward(maps)
    without_los.changed("cotangents", out=None, tout=None).jvp_backward(maps)
    call.changed("outputs", tout_lo=None).changed("cotangents", tout=None).jvp_backward(maps)
    assert "forward" not in "".join(steps_of(recorder))


# ----------------------------------------------------------------------------
# Packed sequences


def test_packed_sequences_are_a_batch_without_a_stride(
    maps: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(packed_case(seqlens_q=(3, 5, 1), seqlens_k=(6, 2, 4), beyond=2, causal=True))
    call.all_four(maps)
    sizes = {"batch": 3, "seqlen_q": 5, "seqlen_k": 6, "causal": 1}
    for name, fields, _ in recorder.launches:
        assert sizes.items() <= fields.items(), name
        assert fields["cu_seqlens_q"] == call.inputs.cu_seqlens_q.data_ptr()
        assert fields["cu_seqlens_k"] == call.inputs.cu_seqlens_k.data_ptr()
        strides = {x: tensor[1:] for x, tensor in tensors_in(fields).items()}
        assert {stride[0] for stride in strides.values()} == {0}, name
        assert strides["q"][1:] == (4 * 64, 64)
        assert strides["lse"][1:] == (3 + 5 + 1 + 2,)


def test_max_seqlens_may_be_longer_than_all_tokens(maps: CudaBackend, recorder: Recorder) -> None:
    call = call_of(packed_case(seqlens_q=(3, 5), seqlens_k=(6, 2)))
    options = replace(call.options, max_seqlens=(1000, 7))
    replace(call, options=options).forward(maps)
    assert (recorder.fields["seqlen_q"], recorder.fields["seqlen_k"]) == (3 + 5, 7)


def test_cu_seqlens_of_any_stride_are_passed_as_the_kernels_read_them(
    maps: CudaBackend, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    def launch(name: str, params: Params, stream: int) -> None:
        for address in (params.cu_seqlens_q, params.cu_seqlens_k):
            read.append(list((ctypes.c_int32 * 3).from_address(address)))

    monkeypatch.setattr(recorder, "launch", launch)
    call = call_of(packed_case(seqlens_q=(3, 5), seqlens_k=(6, 2)))
    both = torch.stack(call.inputs[4:], dim=1)
    call.changed("inputs", cu_seqlens_q=both[:, 0], cu_seqlens_k=both[:, 1]).forward(maps)
    assert read == [[0, 3, 8], [0, 6, 8]]


def test_tokens_of_no_sequence_have_results_from_the_start(maps: CudaBackend) -> None:
    """The kernels write nothing there, and here they write nothing at all."""
    call = call_of(packed_case(beyond=2))
    outputs = call.forward_jvp(maps)
    assert torch.equal(outputs.lse, torch.full_like(outputs.lse, -torch.inf))
    zeros = outputs._replace(lse=None, out_lo=None, tout_lo=None)
    for x in named((zeros, call.backward(maps), call.jvp_backward(maps))).values():
        assert torch.equal(x, torch.zeros_like(x))


# ----------------------------------------------------------------------------
# Results


@pytest.mark.parametrize(
    "case",
    [
        case_of(heads=4, heads_k=2),
        case_of(heads=4, heads_k=2, mask="additive"),
        packed_case(beyond=1),
    ],
    ids=["dense", "masked", "packed"],
)
def test_shapes_and_dtypes_of_all_results(case: Case | PackedCase, maps: CudaBackend) -> None:
    call = call_of(case)
    found, expected = (named(call.all_four(x)) for x in (maps, tiled))
    assert found.keys() >= expected.keys()  # tiled has no residuals
    for name, x in expected.items():
        assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype), name


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_out_and_its_tangent_lie_in_memory_as_q_does(
    order: tuple[int, ...], maps: CudaBackend
) -> None:
    call = call_of(Case(head_dim=8, head_dim_v=16, dtype=BF16))
    inverse = tuple(order.index(i) for i in range(4))
    q = call.inputs.q.permute(order).contiguous().permute(inverse)
    outputs = call.changed("inputs", q=q).forward_jvp(maps)
    assert outputs.out.permute(order).is_contiguous()
    assert outputs.tout.stride() == outputs.out.stride()


@pytest.mark.parametrize(
    "case",
    [
        case_of(batch=0),
        case_of(seqlen_q=0),
        case_of(seqlen_k=0),
        packed_case(seqlens_q=(), seqlens_k=(), beyond=3),
        packed_case(seqlens_q=(0, 0), seqlens_k=(4, 2)),
    ],
    ids=["no batch", "no queries", "no keys", "no sequences", "sequences without queries"],
)
def test_an_empty_problem_is_computed_without_kernels(
    case: Case | PackedCase, maps: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(case, return_lo=False)
    assert_close(named(call.all_four(maps)), named(call.all_four(tiled)), tolerance=0)
    assert recorder.names == []


# ----------------------------------------------------------------------------
# Refusals: a kernel would follow any pointer


def zeros(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("part", "wrong", "error", "message"),
    [
        (
            "outputs",
            {"out": zeros(2, 5, 4, 63)},
            ValueError,
            r"out must have shape \(2, 5, 4, 64\), got \(2, 5, 4, 63\)",
        ),
        (
            "outputs",
            {"lse": zeros(2, 4, 5)},
            TypeError,
            "lse must have dtype torch.float32, got torch.bfloat16",
        ),
        (
            "cotangents",
            {"out": zeros(2, 5, 4, 64, dtype=torch.float32)},
            TypeError,
            "grad_out must have dtype torch.bfloat16, got torch.float32",
        ),
        (
            "cotangents",
            {"out": zeros(2, 5, 4, 64, device="meta")},
            ValueError,
            "grad_out is on meta but q is on cpu",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    part: str,
    wrong: dict[str, Tensor],
    error: type[Exception],
    message: str,
    maps: CudaBackend,
    recorder: Recorder,
) -> None:
    with pytest.raises(error, match=message):
        call_of(case_of()).changed(part, **wrong).backward(maps)
    assert recorder.names == []


def test_a_dtype_without_kernels_is_refused(maps: CudaBackend) -> None:
    with pytest.raises(TypeError, match="float32, but the CUDA kernels compute in"):
        call_of(Case(dtype=torch.float32)).forward(maps)


def test_a_head_dim_without_kernels_is_refused(maps: CudaBackend) -> None:
    message = "no CUDA kernel of forward has these head dims; use .*'tiled'"
    with pytest.raises(ValueError, match=message):
        call_of(case_of(257)).forward(maps)


def test_a_sequence_that_is_too_long_is_refused(maps: CudaBackend, recorder: Recorder) -> None:
    call = call_of(case_of())
    q = call.inputs.q[:, :1].expand(2, 2**30, 4, 64)
    with pytest.raises(ValueError, match="q has seqlen 1073741824, but the CUDA kernels take up"):
        call.changed("inputs", q=q).forward(maps)
    assert recorder.names == []


def test_an_error_of_the_extension_comes_through(
    maps: CudaBackend, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, params: Params, stream: int) -> None:
        raise RuntimeError(f"kernel {name}: out of luck")

    monkeypatch.setattr(recorder, "launch", fail)
    with pytest.raises(RuntimeError, match="kernel forward_bf16_d64: out of luck"):
        call_of(case_of()).forward(maps)
