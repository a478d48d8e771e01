"""``python -m jvp_attn.info`` tells what a bug report needs, on any machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jvp_attn import info
from jvp_attn.backends import select
from jvp_attn.backends.kernel_select import PRIMITIVES
from jvp_attn.backends.kernel_table import KERNELS

H200 = {
    "name": "NVIDIA H200",
    "capability": (9, 0),
    "multiprocessors": 132,
    "memory": 141 * 2**30,
    "shared_memory_per_block": 227 * 1024,
}

ON_A_GPU = info.Report(
    jvp_attn="0.1.0",
    python="3.12.1",
    torch="2.13.0",
    torch_cuda="13.0",
    os="Linux",
    cpu="A CPU, 8 cores",
    cpu_extension=info.CpuExtension(instruction_sets=["avx2", "baseline"]),
    extension=info.Extension(
        build={
            "archs": ["sm_80", "sm_90a"],
            "nvcc": "13.0.88",
            "compiler": "GCC 12.2.0",
            "git_hash": "0123456789ab",
        },
        runtime_version="13.0",
        driver_version="13.1",
    ),
    devices=[H200],
    available_backends=("cuda", "math"),
    current_backend="automatic",
)


def test_text_has_one_line_a_fact() -> None:
    assert info.as_text(ON_A_GPU).splitlines() == [
        "jvp_attn   0.1.0",
        "python     3.12.1",
        "torch      2.13.0 (CUDA 13.0)",
        "os         Linux",
        "cpu        A CPU, 8 cores; kernels for avx2, baseline",
        "extension  sm_80 sm_90a; nvcc 13.0.88, GCC 12.2.0, git 0123456789ab; "
        "CUDA runtime 13.0, driver 13.1",
        "device     NVIDIA H200, compute capability 9.0, 132 SMs, 141 GiB, "
        "227 KiB of shared memory a block",
        "backend    automatic (available: cuda, math)",
    ]


def test_json_and_text_tell_the_same_machine() -> None:
    def printed(*options: str) -> str:
        command = [sys.executable, "-m", "jvp_attn.info", *options]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stderr == ""
        return result.stdout

    report = info.collect()
    assert json.loads(printed("--json")) == json.loads(json.dumps(asdict(report)))
    assert printed() == info.as_text(report) + "\n"
    assert report.torch == torch.__version__


def test_a_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jvp_attn._C", None)
    report = info.collect()
    assert report.extension.build is None
    assert "jvp_attn._C" in report.extension.import_error
    assert report.extension.import_error in info.as_text(report)


def test_missing_kernels_of_the_cpu_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jvp_attn._cpu", None)
    report = info.collect()
    assert report.cpu_extension.instruction_sets is None
    assert "jvp_attn._cpu" in report.cpu_extension.import_error
    assert f"; no kernels ({report.cpu_extension.import_error}; " in info.as_text(report)


def test_no_device_is_explained() -> None:
    extension = replace(ON_A_GPU.extension, device_error="no CUDA driver is installed")
    report = replace(ON_A_GPU, extension=extension, devices=[])
    assert "devices    none (no CUDA driver is installed)" in info.as_text(report).splitlines()


# ----------------------------------------------------------------------------
# Which kernels compute attention of a shape

SHAPE = ("--shape", "2,4096,16,200", "--heads-k", "4", "--capability", "8.0")


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "jvp_attn._C", None)
    select._why_no_extension.cache_clear()
    yield
    select._why_no_extension.cache_clear()


@pytest.fixture
def extension(no_extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says of all kernels that they take 128 threads and 48 KiB."""
    described = {name: {"threads": 128, "shared_bytes": 48 * 1024} for name in KERNELS}
    monkeypatch.setitem(sys.modules, "jvp_attn._C", SimpleNamespace(kernels=lambda: described))


def printed(monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["info", *options])
    with redirect_stdout(StringIO()) as output:
        info.main()
    return output.getvalue()


def tile_text(kernel: str) -> str:
    return "tile of {} rows x {} keys".format(*KERNELS[kernel].tile)


@pytest.mark.usefixtures("no_extension")
def test_kernels_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, tangent = "forward_bf16_d256", "tangent_only_bf16_d256"
    dq, dkv = "backward_dq_bf16_d256", "backward_dkv_bf16_d256"
    assert printed(monkeypatch, *SHAPE).splitlines() == [
        "forward           kernels for bfloat16, head dim 200 padded to 256",
        f"                    {forward}, {tile_text(forward)}",
        "forward_jvp       kernels for bfloat16, head dim 200 padded to 256",
        f"                    {forward}, {tile_text(forward)}",
        f"                    {tangent}, {tile_text(tangent)}",
        "backward          kernels for bfloat16, head dim 200 padded to 256",
        "                    preprocess_bf16",
        f"                    {dq}, {tile_text(dq)}",
        f"                    {dkv}, {tile_text(dkv)}",
        "jvp_backward      tiled, because it has no kernel for head dim 256",
    ]


@pytest.mark.usefixtures("extension")
def test_the_extension_knows_what_its_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    line = printed(monkeypatch, *SHAPE).splitlines()[1]
    assert line.endswith(" keys, 128 threads, 48 KiB shared memory")


def test_kernels_of_a_shape_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = json.loads(printed(monkeypatch, *SHAPE, "--head-dim-v", "64", "--json"))
    assert [report["primitive"] for report in reports] == list(PRIMITIVES)
    assert reports[0]["kernels"][0]["name"] == "forward_bf16_d256"
    assert reports[0]["why"] == "bfloat16, head dim 200 and 64 padded to 256"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--dtype", "float32"), "and q has float32"),
        (("--capability", "7.5"), "the device has 7.5"),
        (("--seqlen-k", "1073741824"), "that of k is 1073741824"),
        (("--head-dim-v", "257"), "head_dim_v 257 is above 256, the kernels' largest"),
        (("--head-dim-v", "0"), "head_dim_v is 0, and the kernels' smallest is 1"),
    ],
)
def test_tiled_has_its_reason(
    options: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(monkeypatch, *SHAPE, *options).splitlines()
    assert len(lines) == len(PRIMITIVES)
    assert all("tiled, because " in line and reason in line for line in lines)


@pytest.mark.parametrize(
    ("cpu_extension", "backend"), [(SimpleNamespace(), "cpu"), (None, "tiled")]
)
def test_without_a_device_the_cpu_computes(
    cpu_extension: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "jvp_attn._cpu", cpu_extension)
    select._why_no_cpu_extension.cache_clear()
    lines = printed(monkeypatch, "--shape", "1,8,2,64").splitlines()
    select._why_no_cpu_extension.cache_clear()
    assert lines[0] == f"forward           {backend}, because torch sees no CUDA device"


@pytest.mark.usefixtures("no_extension")
def test_tiled_computes_wide_heads_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, "--shape", "1,8,2,512").splitlines()
    assert lines[0] == (
        "forward           tiled, because head_dim 512 is above 256, the kernels' largest"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "2,4096,16"), "'2,4096,16' is not batch,seqlen,heads,head_dim"),
        ((*SHAPE, "--heads-k", "3"), "q has 16 heads and k has 3"),
        ((*SHAPE, "--heads-k=-4"), "'-4' is no size such as 16"),
        ((*SHAPE, "--capability", "Hopper"), "'Hopper' is no compute capability such as 8.0"),
        (("--heads-k", "3"), "these options describe a problem, which also needs --shape"),
    ],
)
def test_wrong_options_are_explained(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        printed(monkeypatch, *options)
    assert message in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_extension_and_torch_see_the_same_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_by_extension = info.collect().devices
    monkeypatch.setitem(sys.modules, "jvp_attn._C", None)
    assert seen_by_extension == info.collect().devices
