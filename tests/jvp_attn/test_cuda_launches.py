"""What the maps of the CUDA backend hand to the kernels, seen by an extension that only records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_close, named
from torch import Tensor

from jvp_attn import blockwise
from jvp_attn.cuda import KernelMaps
from jvp_attn.maps import AttentionOptions

STREAM = 77
OPTIONS = AttentionOptions(0.25, backend="cuda")
WITHOUT_RESIDUALS = AttentionOptions(0.25, backend="cuda", residuals=False)


class Params:
    """Fields that were set."""


class Recorder:
    """Stands in for the extension: keeps what is launched, and computes nothing."""

    AttentionParams = Params

    def __init__(self) -> None:
        self.launches: list[tuple[str, dict[str, Any], int]] = []
        self.streams_of: list[torch.device] = []

    def Tensor(self, *address_and_strides: int) -> tuple[int, ...]:
        assert len(address_and_strides) == 4
        return address_and_strides

    def RowVector(self, *address_and_strides: int) -> tuple[int, ...]:
        assert len(address_and_strides) == 3
        return address_and_strides

    def launch(self, name: str, params: Params, stream: int) -> None:
        self.launches.append((name, dict(vars(params)), stream))

    @contextmanager
    def stream_of(self, device: torch.device) -> Iterator[int]:
        self.streams_of.append(device)
        yield STREAM

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.launches]

    @property
    def fields(self) -> dict[str, Any]:
        """What the last kernel was given."""
        return self.launches[-1][1]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def maps(recorder: Recorder) -> KernelMaps:
    return KernelMaps(recorder, recorder.stream_of)


def case_of(head_dim: int = 64, **changes: Any) -> Case:
    return Case(head_dim=head_dim, head_dim_v=head_dim, dtype=torch.bfloat16, **changes)


def outputs_of(case: Case) -> dict[str, Tensor]:
    """All that the backward maps are given besides q, k, v and their tangents."""
    out, lse, tout, mu, *_ = blockwise.forward_tangent(*case.data().values(), OPTIONS)
    outputs = {"out": out, "lse": lse, "tout": tout, "mu": mu}
    return {
        **outputs,
        "out_residual": torch.zeros_like(out),
        "tout_residual": torch.zeros_like(out),
    }


def backward(maps: KernelMaps, case: Case, **changes: Any) -> Any:
    y = outputs_of(case) | {"grad_out": outputs_of(case)["tout"], "grad_lse": None} | changes
    names = ("out", "lse", "out_residual", "grad_out", "grad_lse")
    return maps.backward(*case.primals().values(), *(y[name] for name in names), OPTIONS)


def tangent_backward(
    maps: Any, case: Case, needed: tuple[bool, bool, bool] = (True, True, True), **changes: Any
) -> Any:
    y = outputs_of(case)
    y |= {"grad_out": y["tout"], "grad_lse": None, "grad_tout": y["out"], "grad_mu": y["lse"]}
    y |= changes
    names = ("out", "lse", "tout", "mu", "out_residual", "tout_residual")
    grads = ("grad_out", "grad_lse", "grad_tout", "grad_mu")
    tensors = (*case.data().values(), *(y[name] for name in (*names, *grads)))
    return maps.tangent_backward(*tensors, OPTIONS, needed)


# ----------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize(("head_dim", "padded"), [(3, 64), (72, 96), (128, 128), (200, 256)])
def test_dtype_and_head_dim_choose_the_kernel(
    head_dim: int, padded: int, dtype: torch.dtype, element: str, maps: KernelMaps, recorder: Any
) -> None:
    maps.forward(*Case(head_dim=head_dim, dtype=dtype).primals().values(), OPTIONS)
    assert recorder.names == [f"forward_{element}_d{padded}"]


def test_forward_with_tangent_is_one_launch_and_at_head_dim_256_two(
    maps: KernelMaps, recorder: Recorder
) -> None:
    maps.forward_tangent(*case_of(128).data().values(), OPTIONS)
    maps.forward_tangent(*case_of(256).data().values(), WITHOUT_RESIDUALS)
    assert recorder.names == [
        "forward_tangent_bf16_d128",
        "forward_bf16_d256",
        "tangent_given_forward_bf16_d256",
    ]
    # The second step continues from all that the first has computed.
    first, second = (fields for _, fields, _ in recorder.launches[1:])
    assert "out_residual" in first
    assert first == second


def test_backward_maps_are_three_launches(maps: KernelMaps, recorder: Recorder) -> None:
    backward(maps, case_of())
    tangent_backward(maps, case_of())
    steps = [name.removesuffix("_bf16").removesuffix("_bf16_d64") for name in recorder.names]
    assert steps == [
        *("preprocess", "backward_dq", "backward_dkv"),
        *("preprocess", "tangent_backward_dq", "tangent_backward_dkv"),
    ]


def test_tangent_backward_is_blockwise_where_it_has_no_kernel(
    maps: KernelMaps, recorder: Recorder
) -> None:
    case = case_of(136)
    assert_close(
        named(tangent_backward(maps, case)), named(tangent_backward(blockwise, case)), tolerance=0
    )
    assert recorder.names == []


def test_all_kernels_of_a_map_run_on_the_current_stream_of_the_device(
    maps: KernelMaps, recorder: Recorder
) -> None:
    backward(maps, case_of())
    assert [stream for *_, stream in recorder.launches] == 3 * [STREAM]
    assert recorder.streams_of == [torch.device("cpu")]


# ----------------------------------------------------------------------------
# What they are given


def test_numbers(maps: KernelMaps, recorder: Recorder) -> None:
    q, k, v = Case(2, 5, 7, heads=4, heads_k=2, dtype=torch.float16).primals().values()
    maps.forward(q, k, v, AttentionOptions(0.25, causal=True))
    numbers = {name: x for name, x in recorder.fields.items() if not isinstance(x, tuple)}
    assert numbers == {
        "batch": 2,
        "seqlen_q": 5,
        "seqlen_k": 7,
        "heads": 4,
        "heads_k": 2,
        "head_dim": 3,
        "head_dim_v": 6,
        "softmax_scale": 0.25,
        "causal": 1,
    }
    maps.forward(q, k, v, AttentionOptions(0.25))
    assert recorder.fields["causal"] == 0


def test_inputs_are_passed_with_their_strides(maps: KernelMaps, recorder: Recorder) -> None:
    q, k, v = case_of().primals().values()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], 1)[:, 1 : 1 + k.shape[1]]
    v = v[:1].expand(v.shape)
    maps.forward(q, k, v, OPTIONS)
    for name, x in {"q": q, "k": k, "v": v}.items():
        assert recorder.fields[name] == (x.data_ptr(), *x.stride()[:3]), name
    assert recorder.fields["v"][1] == 0


def test_only_a_strided_last_dimension_is_copied(maps: KernelMaps, recorder: Recorder) -> None:
    q, k, v = case_of().primals().values()
    maps.forward(q.mT.contiguous().mT, k, v, OPTIONS)
    assert recorder.fields["q"][1:] == q.stride()[:3]
    assert recorder.fields["k"][0] == k.data_ptr()

    grad_lse = torch.ones(()).expand(2, 4, 5)
    backward(maps, case_of(), grad_lse=grad_lse)
    assert recorder.fields["grad_lse"][1:] == (4 * 5, 5)


def test_what_is_absent_is_not_passed(maps: KernelMaps, recorder: Recorder) -> None:
    q, k, v, tq, *_ = case_of().data().values()
    maps.forward_tangent(q, k, v, tq, None, None, WITHOUT_RESIDUALS)
    absent = {"tk", "tv", "out_residual", "tout_residual", "grad_out"}
    assert not absent & recorder.fields.keys()
    assert {"tq", "out", "tout", "lse", "mu"} <= recorder.fields.keys()

    _, (gtq, gtk, gtv) = tangent_backward(maps, case_of(), (False, True, False))
    assert gtq is None
    assert gtv is None
    assert recorder.fields["grad_tk"][0] == gtk.data_ptr()
    assert not {"grad_tq", "grad_tv"} & recorder.fields.keys()


def test_residuals_are_returned_if_asked_for(maps: KernelMaps, recorder: Recorder) -> None:
    data = case_of().data().values()
    *_, out_residual, tout_residual = maps.forward_tangent(*data, OPTIONS)
    assert recorder.fields["out_residual"][0] == out_residual.data_ptr()
    assert recorder.fields["tout_residual"][0] == tout_residual.data_ptr()
    assert maps.forward_tangent(*data, WITHOUT_RESIDUALS)[4:] == (None, None)
    assert maps.forward_tangent(*case_of(256).data().values(), WITHOUT_RESIDUALS)[4:] == (
        None,
        None,
    )


def test_residuals_that_are_missing_are_computed_anew(maps: KernelMaps, recorder: Recorder) -> None:
    backward(maps, case_of(), out_residual=None)
    assert recorder.names[0] == "forward_bf16_d64"
    of_forward = recorder.launches[0][1]
    assert recorder.fields["out"] == of_forward["out"]
    assert recorder.fields["out_residual"] == of_forward["out_residual"]

    recorder.launches.clear()
    tangent_backward(maps, case_of(), tout_residual=None)
    assert recorder.names[0] == "forward_tangent_bf16_d64"
    of_forward = recorder.launches[0][1]
    for name in ("out", "tout", "out_residual", "tout_residual"):
        assert recorder.fields[name] == of_forward[name]


def test_residuals_that_nothing_reads_are_not_computed(
    maps: KernelMaps, recorder: Recorder
) -> None:
    lse = outputs_of(case_of())["lse"]
    backward(maps, case_of(), out_residual=None, grad_out=None, grad_lse=lse)
    tangent_backward(maps, case_of(), tout_residual=None, grad_tout=None)
    assert not [name for name in recorder.names if name.startswith("forward")]


# ----------------------------------------------------------------------------
# Results


def test_shapes_and_dtypes_of_all_results(maps: KernelMaps) -> None:
    case = case_of(heads=4, heads_k=2)
    data = list(case.data().values())
    for ours, expected in (
        (maps.forward(*data[:3], OPTIONS)[:2], blockwise.forward(*data[:3], OPTIONS)[:2]),
        (maps.forward_tangent(*data, OPTIONS)[:4], blockwise.forward_tangent(*data, OPTIONS)[:4]),
        (backward(maps, case), data[:3]),
        (tangent_backward(maps, case), (tuple(data[:3]), tuple(data[3:]))),
    ):
        expected_tensors = named(expected)
        assert named(ours).keys() == expected_tensors.keys()
        for name, x in named(ours).items():
            assert x.shape == expected_tensors[name].shape
            assert x.dtype == expected_tensors[name].dtype


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_out_and_its_tangent_lie_in_memory_as_q_does(
    order: tuple[int, ...], maps: KernelMaps
) -> None:
    case = Case(head_dim=8, head_dim_v=16, dtype=torch.bfloat16)
    q, *others = case.data().values()
    inverse = tuple(order.index(i) for i in range(4))
    q = q.permute(order).contiguous().permute(inverse)
    out, _, tout, *_ = maps.forward_tangent(q, *others, OPTIONS)
    assert out.permute(order).is_contiguous()
    assert tout.stride() == out.stride()


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
def test_an_empty_problem_is_computed_without_kernels(
    empty: str, maps: KernelMaps, recorder: Recorder
) -> None:
    case = case_of(**{empty: 0})
    data = list(case.data().values())
    assert_close(
        named(maps.forward_tangent(*data, OPTIONS)[:4]),
        named(blockwise.forward_tangent(*data, OPTIONS)[:4]),
        tolerance=0,
    )
    assert_close(
        named(tangent_backward(maps, case)), named(tangent_backward(blockwise, case)), tolerance=0
    )
    assert_close(named(backward(maps, case)), named(backward(blockwise, case)), tolerance=0)
    assert recorder.names == []


# ----------------------------------------------------------------------------
# Refusals: a kernel would follow any pointer


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"out": zeros(2, 5, 4, 63)},
            ValueError,
            r"out must have shape \(2, 5, 4, 64\), got \(2, 5, 4, 63\)",
        ),
        (
            {"lse": zeros(2, 4, 5)},
            TypeError,
            "lse must have dtype torch.float32, got torch.bfloat16",
        ),
        (
            {"grad_out": zeros(2, 5, 4, 64, dtype=torch.float32)},
            TypeError,
            "grad_out must have dtype torch.bfloat16, got torch.float32",
        ),
        (
            {"grad_out": zeros(2, 5, 4, 64, device="meta")},
            ValueError,
            "grad_out is on meta but q is on cpu",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    wrong: dict[str, Tensor],
    error: type[Exception],
    message: str,
    maps: KernelMaps,
    recorder: Recorder,
) -> None:
    with pytest.raises(error, match=message):
        backward(maps, case_of(), **wrong)
    assert recorder.names == []


def test_a_dtype_without_kernels_is_refused(maps: KernelMaps) -> None:
    with pytest.raises(TypeError, match="float32, but the CUDA kernels compute in"):
        maps.forward(*Case(dtype=torch.float32).primals().values(), OPTIONS)


def test_a_head_dim_without_kernels_is_refused(maps: KernelMaps) -> None:
    with pytest.raises(ValueError, match="head dims 257 and 257: no CUDA kernel of forward"):
        maps.forward(*case_of(257).primals().values(), OPTIONS)


def test_a_sequence_that_is_too_long_is_refused(maps: KernelMaps, recorder: Recorder) -> None:
    q, k, v = case_of().primals().values()
    with pytest.raises(ValueError, match="q has seqlen 1073741824, but the CUDA kernels take up"):
        maps.forward(q[:, :1].expand(2, 2**30, 4, 64), k, v, OPTIONS)
    assert recorder.names == []


def test_an_error_of_the_extension_comes_through(maps: KernelMaps, recorder: Any) -> None:
    def fail(name: str, params: Params, stream: int) -> None:
        raise RuntimeError(f"kernel {name}: out of luck")

    recorder.launch = fail
    with pytest.raises(RuntimeError, match="kernel forward_bf16_d64: out of luck"):
        maps.forward(*case_of().primals().values(), OPTIONS)
