"""Streams, devices, CUDA graphs, batches and compilation do not change the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import jvp_attn
from jvp_attn import flash_attn_varlen_jvp
from tests.gpu.machines import Machine, outputs, outputs_and_gradients
from tests.gpu.test_gpu_layouts import assert_same
from tests.jvp_attn.attention_cases import Case, assert_close, with_tangents
from tests.jvp_attn.packed_cases import PackedCase

Tensors = dict[str, Tensor]

CASES = [
    Case(2, 1000, 1100, 4, 2, 64, 64, causal=True, dtype=torch.bfloat16),
    Case(1, 600, 500, 2, 2, 128, 128, dtype=torch.float16),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=["bfloat16-64", "float16-128"])


def shrunk(machine: Machine, case: Case) -> Case:
    lengths = {x: machine.scaled(getattr(case, x)) for x in ("seqlen_q", "seqlen_k")}
    return replace(case, **lengths)


# ----------------------------------------------------------------------------
# On a CPU and on a GPU


@over_cases
def test_repetitions_agree_bit_for_bit(machine: Machine, case: Case) -> None:
    case = shrunk(machine, case)
    data, cotangents = machine.data(case), machine.cotangents(case)
    first = outputs_and_gradients(case.ours, data, cotangents)
    for _ in range(10):
        assert_same(outputs_and_gradients(case.ours, data, cotangents), first)


@over_cases
def test_a_batch_agrees_with_its_parts_bit_for_bit(machine: Machine, case: Case) -> None:
    case = shrunk(machine, replace(case, batch=3))
    data, cotangents = machine.data(case), machine.cotangents(case)
    whole = outputs_and_gradients(case.ours, data, cotangents)
    for i in range(3):
        part, cotangents_of_part = (
            {n: x[i : i + 1] for n, x in y.items()} for y in (data, cotangents)
        )
        assert_same(
            outputs_and_gradients(case.ours, part, cotangents_of_part),
            {name: x[i : i + 1] for name, x in whole.items()},
        )


@over_cases
def test_compiled_equals_eager(machine: Machine, case: Case) -> None:
    case = shrunk(machine, case)
    data, cotangents = machine.data(case), machine.cotangents(case)
    eager = outputs_and_gradients(case.ours, data, cotangents)
    how = "inductor" if machine.device.type == "cuda" else "aot_eager"
    torch.compiler.reset()
    compiled = torch.compile(case.ours, backend=how)
    assert_close(outputs_and_gradients(compiled, data, cotangents), eager, tolerance=0)

    jvp_within = torch.compile(lambda x: with_tangents(case.ours, x), backend=how)
    with torch.no_grad():
        assert_close(jvp_within(data), outputs(case.ours, data), tolerance=0)


# ----------------------------------------------------------------------------
# On a GPU only


on_a_gpu = pytest.mark.parametrize(
    "machine", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)


@on_a_gpu
def test_default_backend_of_half_precision_on_a_gpu_is_cuda(machine: Machine) -> None:
    case = shrunk(machine, CASES[0])
    data, cotangents = machine.data(case), machine.cotangents(case)
    expected = outputs_and_gradients(case.ours, data, cotangents)
    with jvp_attn.backend("automatic"):
        assert_same(outputs_and_gradients(case.ours, data, cotangents), expected)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_default_backend_of_full_precision_on_a_gpu_is_tiled(
    machine: Machine, dtype: torch.dtype
) -> None:
    case = replace(shrunk(machine, CASES[0]), dtype=dtype)
    data, cotangents = machine.data(case), machine.cotangents(case)
    cotangents = {name: x.to(dtype) for name, x in cotangents.items()}
    with jvp_attn.backend("tiled"):
        expected = outputs_and_gradients(case.ours, data, cotangents)
    with jvp_attn.backend("automatic"):
        assert_same(outputs_and_gradients(case.ours, data, cotangents), expected)


@on_a_gpu
@over_cases
def test_kernels_run_on_the_current_stream(machine: Machine, case: Case) -> None:
    data, cotangents = machine.data(case), machine.cotangents(case)
    expected = outputs_and_gradients(case.ours, data, cotangents)
    late = {name: torch.zeros_like(x) for name, x in data.items()}
    torch.cuda.synchronize()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            200_000_000
        )  # cycles, in which a kernel on another stream would read the zeros
        for name, x in late.items():
            x.copy_(data[name])
        found = outputs_and_gradients(case.ours, late, cotangents)
    stream.synchronize()
    assert_same(found, expected)


@on_a_gpu
def test_two_streams_do_not_interfere(machine: Machine) -> None:
    problems = []
    for case in CASES:
        data, cotangents = machine.data(case), machine.cotangents(case)
        expected = outputs_and_gradients(case.ours, data, cotangents)
        problems.append((torch.cuda.Stream(), case, data, cotangents, expected, []))
    torch.cuda.synchronize()

    for _ in range(10):
        for stream, case, data, cotangents, _, found in problems:
            with torch.cuda.stream(stream):
                found.append(outputs_and_gradients(case.ours, data, cotangents))
    torch.cuda.synchronize()
    for *_, expected, found in problems:
        for x in found:
            assert_same(x, expected)


@on_a_gpu
@over_cases
def test_tensors_may_be_on_another_device_than_the_current(machine: Machine, case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    data, cotangents = machine.data(case), machine.cotangents(case)
    second = [{name: x.to("cuda:1") for name, x in y.items()} for y in (data, cotangents)]
    with torch.cuda.device(0):
        found = outputs_and_gradients(case.ours, *second)
        assert torch.cuda.current_device() == 0
    assert {x.device for x in found.values()} == {torch.device("cuda:1")}
    with torch.cuda.device(1):
        assert_same(found, outputs_and_gradients(case.ours, *second))


def captured_in_a_graph(evaluate: Callable[[], Tensors]) -> tuple[torch.cuda.CUDAGraph, Tensors]:
    """A graph, and the results that each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up
        evaluate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = evaluate()
    return graph, results


@on_a_gpu
@over_cases
@pytest.mark.parametrize("evaluate", [outputs, outputs_and_gradients], ids=lambda f: f.__name__)
def test_a_cuda_graph_replays_with_new_data(
    machine: Machine, evaluate: Callable[..., Tensors], case: Case
) -> None:
    data, cotangents = machine.data(case), machine.cotangents(case)
    arguments = (case.ours, data) if evaluate is outputs else (case.ours, data, cotangents)

    graph, captured = captured_in_a_graph(lambda: evaluate(*arguments))

    for _ in range(2):
        graph.replay()
        replayed = {name: x.clone() for name, x in captured.items()}
        assert_same(replayed, evaluate(*arguments))
        for x in data.values():
            x.copy_(x.flip(1))


@on_a_gpu
def test_a_cuda_graph_of_packed_sequences_replays_with_other_lengths(machine: Machine) -> None:
    case = PackedCase((64, 200, 1), (100, 90, 70), head_dim=64, head_dim_v=64, dtype=torch.bfloat16)
    data = {name: x.to(machine.device).requires_grad_() for name, x in case.data().items()}
    ends_q, ends_k = (x.to(machine.device) for x in case.cu_seqlens())

    def evaluate() -> dict[str, Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            lengths = ends_q, ends_k, 200, 260
            return flash_attn_varlen_jvp(q, k, v, *lengths, causal=True, return_lse=True)

        results = outputs(attention, data)
        loss = sum(x.float().sin().sum() for x in (results["out"], results["out_tangent"]))
        gradients = torch.autograd.grad(loss, list(data.values()))
        return {**results, **dict(zip((f"grad_{x}" for x in data), gradients, strict=True))}

    graph, captured = captured_in_a_graph(evaluate)

    for lengths_k in ((100, 90, 70), (0, 260, 0)):
        starts = torch.tensor([0, *lengths_k]).cumsum(0).to(ends_k)
        ends_k.copy_(starts)
        graph.replay()
        replayed = {name: x.clone() for name, x in captured.items()}
        assert_same(replayed, evaluate())
