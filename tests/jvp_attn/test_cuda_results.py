"""What the primitives of the CUDA backend return, and the arguments for which they raise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jvp_attn.backends import tiled
from jvp_attn.backends.cuda import CudaBackend
from tests.jvp_attn.attention_cases import Case, named
from tests.jvp_attn.kernel_recorder import Params, Recorder
from tests.jvp_attn.packed_cases import PackedCase
from tests.jvp_attn.primitive_calls import BF16, bf16_case, bf16_packed_case, call_of


@pytest.mark.parametrize(
    "case",
    [
        bf16_case(heads=4, heads_k=2),
        bf16_case(heads=4, heads_k=2, mask="additive"),
        bf16_packed_case(beyond=1),
    ],
    ids=["dense", "masked", "packed"],
)
def test_shapes_and_dtypes_of_all_results(case: Case | PackedCase, cuda: CudaBackend) -> None:
    call = call_of(case)
    found, expected = (named(call.all_four(x)) for x in (cuda, tiled))
    assert found.keys() >= expected.keys()  # tiled has no low-order parts
    for name, x in expected.items():
        assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype), name


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_out_and_its_tangent_have_the_layout_of_q(
    order: tuple[int, ...], cuda: CudaBackend
) -> None:
    call = call_of(Case(head_dim=8, head_dim_v=16, dtype=BF16))
    inverse = tuple(order.index(i) for i in range(4))
    q = call.inputs.q.permute(order).contiguous().permute(inverse)
    outputs = call.changed("inputs", q=q).forward_jvp(cuda)
    assert outputs.out.permute(order).is_contiguous()
    assert outputs.tout.stride() == outputs.out.stride()


def test_gradients_of_tangents_that_are_not_needed_are_not_computed(
    cuda: CudaBackend, recorder: Recorder
) -> None:
    call = call_of(bf16_case())
    needs = (*call.needs[:4], False, True, False, False)
    _, gradients = replace(call, needs=needs).jvp_backward(cuda)
    assert [name for name, x in gradients._asdict().items() if x is not None] == ["k"]
    assert recorder.fields["grad_tk"][0] == gradients.k.data_ptr()
    assert not {"grad_tq", "grad_tv"} & recorder.fields.keys()


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_only_gradients_that_are_needed_are_returned(needed: str, cuda: CudaBackend) -> None:
    call = call_of(bf16_case(mask="additive"))
    needs = tuple(name == needed for name in ("q", "k", "v", "mask"))
    call = replace(call, needs=(*needs, *needs))
    gradients, tangent_gradients = call.jvp_backward(cuda)
    for found in (call.backward(cuda), gradients, tangent_gradients):
        assert [name for name, x in found._asdict().items() if x is not None] == [needed]


def test_low_order_parts_are_returned_on_request(cuda: CudaBackend, recorder: Recorder) -> None:
    outputs = call_of(bf16_case()).forward_jvp(cuda)
    for name in ("out_lo", "tout_lo", "lse_lo"):
        assert recorder.fields[name][0] == getattr(outputs, name).data_ptr()
    for head_dim in (64, 256):
        outputs = call_of(bf16_case(head_dim), return_lo=False).forward_jvp(cuda)
        assert (outputs.out_lo, outputs.tout_lo, outputs.lse_lo) == (None, None, None)


def test_missing_low_order_parts_are_recomputed(cuda: CudaBackend, recorder: Recorder) -> None:
    call = call_of(bf16_case())
    for missing in ("out_lo", "lse_lo"):
        recorder.launches.clear()
        call.changed("outputs", **{missing: None}).backward(cuda)
        assert recorder.names[0] == "forward_bf16_d64"
        of_forward = recorder.launches[0][1]
        for name in ("out", "lse", "out_lo", "lse_lo"):
            assert recorder.fields[name] == of_forward[name]

    for missing in ("tout_lo", "lse_lo"):
        recorder.launches.clear()
        call.changed("outputs", **{missing: None}).jvp_backward(cuda)
        assert recorder.names[0] == "forward_jvp_bf16_d64"
        of_forward = recorder.launches[0][1]
        for name in ("out", "lse", "tout", "out_lo", "tout_lo", "lse_lo"):
            assert recorder.fields[name] == of_forward[name]


def test_unused_low_order_parts_are_not_recomputed(cuda: CudaBackend, recorder: Recorder) -> None:
    call = call_of(bf16_case())
    without_lo = call.changed("outputs", out_lo=None, tout_lo=None)
    without_lo.changed("cotangents", out=None).backward(cuda)
    without_lo.changed("cotangents", out=None, tout=None).jvp_backward(cuda)
    call.changed("outputs", tout_lo=None).changed("cotangents", tout=None).jvp_backward(cuda)
    assert "forward" not in "".join(recorder.steps)


def test_tokens_outside_all_sequences_have_zero_results(cuda: CudaBackend) -> None:
    """The kernels do not write there, and the recorded ones write nothing at all."""
    call = call_of(bf16_packed_case(beyond=2))
    outputs = call.forward_jvp(cuda)
    assert torch.equal(outputs.lse, torch.full_like(outputs.lse, -torch.inf))
    zeros = outputs._replace(lse=None, out_lo=None, tout_lo=None)
    for x in named((zeros, call.backward(cuda), call.jvp_backward(cuda))).values():
        assert torch.equal(x, torch.zeros_like(x))


# ----------------------------------------------------------------------------
# Bad arguments, checked because a kernel would follow any pointer


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
def test_the_error_names_the_tensor_that_does_not_fit(
    part: str,
    wrong: dict[str, Tensor],
    error: type[Exception],
    message: str,
    cuda: CudaBackend,
    recorder: Recorder,
) -> None:
    with pytest.raises(error, match=message):
        call_of(bf16_case()).changed(part, **wrong).backward(cuda)
    assert recorder.names == []


def test_a_dtype_without_kernels_raises(cuda: CudaBackend) -> None:
    with pytest.raises(TypeError, match="float32, but the CUDA kernels compute in"):
        call_of(Case(dtype=torch.float32)).forward(cuda)


def test_a_head_dim_without_kernels_raises(cuda: CudaBackend) -> None:
    message = "no CUDA kernel of forward has these head dims; use .*'tiled'"
    with pytest.raises(ValueError, match=message):
        call_of(bf16_case(257)).forward(cuda)


def test_a_sequence_that_is_too_long_raises(cuda: CudaBackend, recorder: Recorder) -> None:
    call = call_of(bf16_case())
    q = call.inputs.q[:, :1].expand(2, 2**30, 4, 64)
    with pytest.raises(ValueError, match="q has seqlen 1073741824, but the CUDA kernels take up"):
        call.changed("inputs", q=q).forward(cuda)
    assert recorder.names == []


def test_errors_of_the_extension_are_raised(
    cuda: CudaBackend, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, params: Params, stream: int) -> None:
        raise RuntimeError(f"kernel {name}: out of luck")

    monkeypatch.setattr(recorder, "launch", fail)
    with pytest.raises(RuntimeError, match="kernel forward_bf16_d64: out of luck"):
        call_of(bf16_case()).forward(cuda)
