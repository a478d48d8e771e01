"""The backend `cpu`: threads, forks, instruction sets and layouts."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import jvp_attn
from jvp_attn import flash_attn_jvp, scaled_dot_product_attention
from jvp_attn.backends.cpu import CpuBackend
from tests.jvp_attn.attention_cases import (
    Case,
    Named,
    assert_close,
    named,
    outputs_and_gradients,
    peak_and_largest_allocation,
    randn,
    with_tangents,
)
from tests.jvp_attn.primitive_calls import call_of

_cpu = pytest.importorskip("jvp_attn._cpu", reason="the CPU extension is not built")

pytestmark = pytest.mark.parametrize("computed_by", ["cpu"], indirect=True)

LARGE = Case(2, 150, 300, 4, 2, 32, 16, dtype=torch.float32)
# Few queries, so that the keys are split, and enough keys to use threads.
FEW_QUERIES = Case(1, 20, 5000, 2, 1, 16, 16, dtype=torch.float32)


@pytest.fixture(autouse=True)
def restore_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_threads(count: int, case: Case) -> Named:
    torch.set_num_threads(count)
    return outputs_and_gradients(case.ours, case.data())


# ----------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize(
    "case",
    [
        LARGE,
        replace(LARGE, causal=True),
        replace(LARGE, dtype=torch.bfloat16),
        replace(LARGE, mask="additive", with_tangent="qkvm"),
        replace(LARGE, mask="additive", mask_dims="qk", with_tangent="qkvm"),
        replace(LARGE, mask="additive", mask_dims="hq.", with_tangent="qkvm"),
        FEW_QUERIES,
    ],
    ids=["full", "causal", "bfloat16", "mask", "mask for all heads", "mask for all keys", "split"],
)
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    assert_close(in_threads(5, case), in_threads(1, case), tolerance=0)


@pytest.mark.parametrize("of_mask", [(2, 1, 2), (1, 3, 2), (2, 1, 1), (1, 3, 1)], ids=str)
def test_gradients_of_a_mask_that_examples_share_do_not_depend_on_it(
    of_mask: tuple[int, ...],
) -> None:
    """Threads that add to the same elements at the same time would lose terms."""
    shapes = dict.fromkeys(("q", "k", "v"), (2, 3, 2, 300, 8)) | {"attn_mask": (*of_mask, 300, 300)}
    data = {
        f"{t}{x}": randn(*shape, seed=t + x, dtype=torch.float32)
        for x, shape in shapes.items()
        for t in ("", "t")
    }

    def in_threads(count: int) -> Named:
        torch.set_num_threads(count)
        return outputs_and_gradients(lambda *x: (scaled_dot_product_attention(*x),), data)

    assert_close(in_threads(5), in_threads(1), tolerance=0)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_split_keys_equal_the_naive_formula(causal: bool) -> None:
    case = replace(FEW_QUERIES, causal=causal, dtype=torch.float64)
    data = case.data()
    assert_close(with_tangents(case.ours, data), with_tangents(case.naive, data))


def test_the_number_of_threads_is_torchs() -> None:
    used = []

    def recording(params: Any, instruction_set: str) -> None:
        used.append(params.threads)

    fields = {name: getattr(_cpu, name) for name in ("AttentionParams", "Tensor", "RowVector")}
    backend = CpuBackend(SimpleNamespace(**fields, forward=recording), "baseline")
    for count in (1, 3):
        torch.set_num_threads(count)
        call_of(replace(LARGE, batch=1), backend="cpu").forward(backend)
    assert used == [1, 3]


def test_no_threads_start_beyond_torchs() -> None:
    """More threads would compete with torch's, which spin-wait after finishing."""
    x = tuple(replace(LARGE, seqlen_q=1500, seqlen_k=1500).primals().values())
    torch.set_num_threads(4)
    torch.ones(10**6).exp()  # in all of torch's threads
    counts: list[int] = []
    is_over = threading.Event()

    def count() -> None:
        while not is_over.wait(1e-4):
            counts.append(len(os.listdir("/proc/self/task")))

    watcher = threading.Thread(target=count)
    watcher.start()
    flash_attn_jvp(*x)
    is_over.set()
    watcher.join()
    assert len(counts) > 10
    assert len(set(counts)) == 1


def attention_in_a_child(x: tuple[Tensor, ...], answer: Connection) -> None:
    answer.send(flash_attn_jvp(*x).numpy())


def test_attention_works_in_a_forked_process() -> None:
    x = tuple(LARGE.primals().values())
    torch.set_num_threads(4)
    expected = flash_attn_jvp(*x)  # with threads, in the parent
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=attention_in_a_child, args=(x, sender))
    child.start()
    try:
        assert receiver.poll(60), "the child process does not answer"
        assert torch.equal(torch.from_numpy(receiver.recv()), expected)
    finally:
        child.kill()
        child.join()


def test_attention_works_in_a_process_forked_before_the_import() -> None:
    """OpenMP in the child waits for torch's threads, which exist only in the parent.

    Torch itself has this problem, except with tensors as small as these.
    """
    child = """
import os, signal, torch
torch.set_num_threads(4)
torch.ones(10**6).exp()
if child := os.fork():
    exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(60)
from jvp_attn import flash_attn_jvp
x = torch.ones(1, 200, 4, 32)
os._exit(not torch.allclose(flash_attn_jvp(x, x, x), x))
"""
    subprocess.run([sys.executable, "-c", child], check=True)


# ----------------------------------------------------------------------------
# Instruction sets and layouts


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_instruction_set_gives_the_same_result(
    dtype: torch.dtype, instruction_set: str
) -> None:
    call = call_of(replace(LARGE, dtype=dtype), backend="cpu", return_lo=False)
    fastest, this = (call.forward_jvp(CpuBackend(_cpu, x)) for x in (None, instruction_set))
    tolerance = 20 * torch.finfo(dtype).eps
    assert_close(named(this), named(fastest), tolerance)


def test_an_instruction_set_that_the_cpu_lacks_raises() -> None:
    call = call_of(Case(), backend="cpu")
    with pytest.raises(ValueError, match="does not run instruction set amx"):
        call.forward(CpuBackend(_cpu, "amx"))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every other"])
def test_rows_that_are_contiguous_are_not_copied(layout: str) -> None:
    q, k, v = replace(LARGE, heads=2).primals().values()
    laid_out = {
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda x: x[:1, :, :1].expand(x.shape),
        "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }[layout]
    x = tuple(laid_out(y) for y in (q, k, v))
    with torch.no_grad():
        _, largest = peak_and_largest_allocation(lambda: flash_attn_jvp(*x))
    smallest = min(y.numel() for y in (q, k, v)) * 4
    outputs = q.numel() // q.shape[-1] * v.shape[-1] * 4
    assert largest <= outputs < smallest
    assert_close({"out": flash_attn_jvp(*x)}, {"out": flash_attn_jvp(*(y.clone() for y in x))}, 0)


def test_a_strided_last_dimension_is_copied() -> None:
    x = [y.repeat_interleave(2, 3)[..., ::2] for y in LARGE.primals().values()]
    with jvp_attn.backend("tiled"):
        expected = flash_attn_jvp(*x)
    assert_close({"out": flash_attn_jvp(*x)}, {"out": expected}, tolerance=1e-6)
