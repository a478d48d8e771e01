"""The cases of benchmarks/first_contact: their order, their sizes, and what failures tell."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import attention_on_gpu
import numpy as np
import pytest
import torch
from contenders import MATH, OPERATIONS, call_of

from benchmarks.first_contact import (
    compare,
    conformance,
    kernels,
    long_sequences,
    machine,
    speed,
)
from benchmarks.first_contact.build import ROOT
from benchmarks.first_contact.case import Wrong
from benchmarks.first_contact.target import HOPPER, Target
from jvp_attn.backends.kernel_table import KERNELS
from tests.emulator import emulator, emulator_build
from tests.jvp_attn.kernel_recorder import Recorder
from tests.kernels.cases import FAMILIES, family_of

GPU = Target(torch.device("cuda"), HOPPER, shrink=1)
CPU = Target(torch.device("cpu"), HOPPER, shrink=128)
H200_MULTIPROCESSORS = 132


def test_python_headers_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.headers()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Python\.h: install Python's headers"):
        machine.headers()


def test_a_difference_names_places_and_numbers() -> None:
    expected = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = expected.copy()
    found[1, 2] = 9
    found[2, 2] = np.nan
    text = conformance.difference(found, expected)
    assert text.startswith("2 of 12 numbers differ, by 3;")
    assert "at (1, 2): 9.0 instead of 6.0" in text
    assert text.endswith("in columns [2]")


def test_every_kernel_has_a_problem_and_those_of_hopper_come_first() -> None:
    names = [problem["kernel"] for _, problem in kernels.problems(None)]
    assert set(names) == set(KERNELS)
    archs = [KERNELS[name].arch for name in names]
    assert archs == sorted(archs, reverse=True)

    hopper = [family for family in FAMILIES if family.arch == "sm90"]
    assert [family_of(KERNELS[name]) for name in names[: len(hopper)]] == hopper
    assert len(list(kernels.problems(1))) == len(FAMILIES)
    labels = [name for name, _ in kernels.problems(None)]
    assert len(set(labels)) == len(labels)


def test_long_sequences_have_more_tiles_than_a_gpu_has_multiprocessors() -> None:
    every = long_sequences.problems(GPU)
    tiles = {name: long_sequences.work_tiles(problem) for name, problem in every.items()}
    equal = [name for name in every if " x 512" not in name and "512 x" not in name]
    assert {"16384 x 16384, d128, full", "8192, d64, causal, tq"} <= set(equal)
    for name in equal:
        assert min(tiles[name].values()) > H200_MULTIPROCESSORS


def test_an_unknown_contender_is_named() -> None:
    assert list(speed.chosen(("jvp_attn",))) == ["jvp_attn"]
    with pytest.raises(ValueError, match=r"no contender .*cuDNN.*; there are jvp_attn, "):
        speed.chosen(("cuDNN",))


def test_a_contender_of_this_package_must_be_timed() -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: illegal instruction")

    problem = speed.problem_of(CPU, "forward", 64, 4096)
    with pytest.raises(Wrong, match="not timed: CUDA error: illegal instruction") as error:
        speed.timed(CPU, problem, {"jvp_attn": (fails, ("forward",))})
    assert error.value.result is not None
    assert error.value.result["tflops"].keys() == {"matmul"}


@pytest.mark.parametrize(("seqlen", "is_timed"), [(8191, True), (8192, False)])
def test_quadratic_memory_is_left_out_of_long_problems(seqlen: int, is_timed: bool) -> None:
    problem = speed.Small("forward", "full", 8, seqlen)
    row = attention_on_gpu.measure(
        problem,
        torch.device("cpu"),
        1,
        contenders={MATH: (lambda q, k, v, causal: v, ("forward",))},
        matmul=8,
    )
    assert (MATH in row["tflops"]) == is_timed
    assert (MATH in row["missing"]) != is_timed


def test_a_macro_that_no_kernel_reads_is_not_compared() -> None:
    with pytest.raises(ValueError, match="no file in csrc/ reads the macro JVP_ATTN_NOTHING"):
        compare.variant(CPU, "JVP_ATTN_NOTHING=0")


def test_builds_that_are_compared_are_different_modules(tmp_path: Path) -> None:
    source = ROOT / "tests" / "gpu" / "conformance.cu"
    built = emulator_build.build_module("conformance_emulator", [source])
    modules = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        file = shutil.copy(built, tmp_path / name)
        modules.append(emulator.import_file(Path(file)))
    assert modules[0] is not modules[1]
    assert modules[0].launch is not modules[1].launch


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_comparison_compiles_the_kernels_that_an_operation_launches(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The comparison adds a backend to the process.
    monkeypatch.setattr(compare.select, "_BACKENDS", dict(compare.select._BACKENDS))
    comparison = compare.Comparison((operation,), (64, 96, 128))
    recorder = Recorder(comparison.kernels)
    attention = compare._attention(CPU, "recorder", recorder)
    for head_dim in comparison.head_dims:
        inputs = speed.problem_of(CPU, operation, head_dim, 4096).inputs(CPU.device)
        call_of(operation, attention, inputs)()
    assert sorted(set(recorder.names)) == comparison.kernels
    assert {x.arch for x in (KERNELS[name] for name in recorder.names) if x.tile} == {"sm90"}


def test_what_is_compared_has_kernels() -> None:
    for comparison in compare.COMPARISONS.values():
        assert set(comparison.kernels) <= set(KERNELS)
