"""Fixtures of the packaging tests: a copy of the project, and machines with or without tools."""

import os
import shutil
from pathlib import Path

import pytest

from tests.package.project import ROOT, write_fake_nvcc


@pytest.fixture
def project(tmp_path: Path, neutral_environment: None) -> Path:
    """A copy of the project without anything built."""
    built = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    ignore = shutil.ignore_patterns(*built)
    return shutil.copytree(ROOT, tmp_path / "project", ignore=ignore)


@pytest.fixture
def neutral_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "JVP_ATTN_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    monkeypatch.setenv("JVP_ATTN_CPU", "0")  # compiling it takes a minute


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = os.environ["PATH"].split(os.pathsep)
    rest = [folder for folder in folders if not shutil.which("nvcc", path=folder)]
    monkeypatch.setenv("PATH", os.pathsep.join(rest))


@pytest.fixture
def no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "no_torch"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('torch is hidden')")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toolkit = tmp_path / "cuda"
    write_fake_nvcc(toolkit / "bin", toolkit)
    monkeypatch.setenv("PATH", str(toolkit / "bin"), prepend=os.pathsep)
    return toolkit
