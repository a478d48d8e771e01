"""``python -m jvp_attn.info`` tells what a bug report needs, on any machine."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from jvp_attn import info

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
        "cpu        A CPU, 8 cores",
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


def test_no_device_is_explained() -> None:
    extension = replace(ON_A_GPU.extension, device_error="no CUDA driver is installed")
    report = replace(ON_A_GPU, extension=extension, devices=[])
    assert "devices    none (no CUDA driver is installed)" in info.as_text(report).splitlines()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_extension_and_torch_see_the_same_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_by_extension = info.collect().devices
    monkeypatch.setitem(sys.modules, "jvp_attn._C", None)
    assert seen_by_extension == info.collect().devices
