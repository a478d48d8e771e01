"""Where nvcc, nvdisasm and cuobjdump are."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from functools import cache
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
SETUP = SimpleNamespace(**run_path(str(ROOT / "setup.py")))


@cache
def nvcc() -> Path:
    """The compiler that the build would use."""
    toolkit = SETUP.find_toolkit()
    if toolkit is None:
        raise FileNotFoundError("no nvcc in CUDA_HOME, CUDA_PATH or PATH")
    return toolkit.root / "bin" / "nvcc"


@cache
def cuda_tool(name: str) -> Path:
    """A tool of the toolkit, in PATH, or from its package nvidia-cuda-<name> on PyPI."""
    toolkit = SETUP.find_toolkit()
    folders = [str(toolkit.root / "bin")] if toolkit else []
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        try:
            files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = next((str(x.locate()) for x in files if x.name == name), None)
    if found is None:
        raise FileNotFoundError(f"no {name} in the toolkit or PATH: pip install nvidia-cuda-{name}")
    return Path(found)
