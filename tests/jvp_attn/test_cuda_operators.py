"""The operators behind the backend `cuda`: what tracers and tensors without data see of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import Case, named
from test_cuda_launches import OPTIONS, Recorder, case_of, outputs_of
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from jvp_attn import FlashAttention, FlashAttentionTangent, cuda_operators
from jvp_attn.cuda import KernelMaps
from jvp_attn.maps import AttentionMaps

NEEDED = (True, False, True)


def all_results(maps: AttentionMaps, data: dict[str, Tensor], y: dict[str, Tensor]) -> Any:
    """Those of the four maps, cotangents being some of the outputs."""
    primals = (data["q"], data["k"], data["v"])
    tangents = (data["tq"], data["tk"], data["tv"])
    out, lse, tout, mu = (y[name] for name in ("out", "lse", "tout", "mu"))
    residuals = (y["out_residual"], y["tout_residual"])
    return (
        maps.forward(*primals, OPTIONS),
        maps.forward_tangent(*primals, *tangents, OPTIONS),
        maps.backward(*primals, out, lse, residuals[0], tout, mu, OPTIONS),
        maps.tangent_backward(
            *(*primals, *tangents, out, lse, tout, mu, *residuals, tout, mu, out, None),
            OPTIONS,
            NEEDED,
        ),
    )


@pytest.fixture
def on_cpu() -> Iterator[Recorder]:
    """The operators have an implementation for the CPU meanwhile, which only records."""
    recorder = Recorder()
    maps = KernelMaps(recorder, recorder.stream_of)
    library = torch.library.Library("jvp_attn", "IMPL")
    for name, implementation in cuda_operators.implementations(lambda: maps).items():
        library.impl(name, implementation, "CPU")
    yield recorder
    library._destroy()


def metadata(results: Any) -> dict[str, Any]:
    return {name: (x.shape, x.stride(), x.dtype) for name, x in named(results).items()}


@pytest.mark.parametrize("head_dim", [64, 256])
def test_tensors_without_data_have_the_shapes_and_strides_of_real_ones(
    head_dim: int, on_cpu: Recorder
) -> None:
    case = case_of(head_dim)
    data, outputs = case.data(), outputs_of(case)
    data["q"] = data["q"].transpose(1, 2).contiguous().transpose(1, 2)
    real = metadata(all_results(cuda_operators, data, outputs))
    on_meta = [{name: x.to("meta") for name, x in y.items()} for y in (data, outputs)]
    assert metadata(all_results(cuda_operators, *on_meta)) == real
    if head_dim > 128 and not torch.cuda.is_available():
        return  # blockwise computes a map: without CUDA, torch cannot index its devices' tensors
    with FakeTensorMode() as mode:
        on_gpu = [
            {name: mode.from_tensor(x).to("cuda:0") for name, x in y.items()}
            for y in (data, outputs)
        ]
        fake = all_results(cuda_operators, *on_gpu)
    assert metadata(fake) == real
    assert {x.device for x in named(fake).values()} == {torch.device("cuda:0")}


def test_arguments_arrive_in_their_places(on_cpu: Recorder) -> None:
    data, outputs = case_of().data(), outputs_of(case_of())
    all_results(cuda_operators, data, outputs)
    through_operators = list(on_cpu.launches)
    on_cpu.launches.clear()
    all_results(KernelMaps(on_cpu, on_cpu.stream_of), data, outputs)
    for (name, fields, stream), (same_name, same_fields, same_stream) in zip(
        through_operators, on_cpu.launches, strict=True
    ):
        assert (name, stream) == (same_name, same_stream)
        assert fields.keys() == same_fields.keys()
        for tensors in (data, outputs):
            for x in tensors.keys() & fields.keys():
                if "forward" not in name or x in data:
                    assert fields[x] == same_fields[x], (name, x)


def test_a_tracer_sees_one_operator_for_each_map(on_cpu: Recorder) -> None:
    data = case_of().data()

    def gradients(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor) -> Any:
        q = q.detach().requires_grad_()
        out, *_ = FlashAttention.apply(q, k, v, OPTIONS)
        _, _, tout, *_ = FlashAttentionTangent.apply(q, k, v, *tangents, OPTIONS)
        return torch.autograd.grad(out.sum() + tout.sum(), q)

    graph = make_fx(gradients, tracing_mode="fake")(*data.values())
    ours = [str(node.target) for node in graph.graph.nodes if "jvp_attn" in str(node.target)]
    names = ["forward", "forward_tangent", "tangent_backward", "backward"]
    assert sorted(ours) == sorted(f"jvp_attn.{name}.default" for name in names)
    assert on_cpu.names == []


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"jvp_attn::forward.*'CPU' backend"):
        FlashAttention.apply(*case_of().primals().values(), OPTIONS)


def test_another_dtype_is_refused_for_tensors_without_data_too() -> None:
    x = [y.to("meta") for y in Case(dtype=torch.float32).primals().values()]
    with pytest.raises(TypeError, match="the CUDA kernels compute in float16 and bfloat16"):
        cuda_operators.forward(*x, OPTIONS)
