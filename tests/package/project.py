"""Helpers of the packaging tests: run commands, build wheels, look into them."""

import json
import runpy
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
setup_py = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))

needs_nvcc = pytest.mark.skipif(setup_py.find_toolkit() is None, reason="nvcc is not installed")


def write_fake_nvcc(folder: Path, toolkit: Path, version: str = "13.0.88") -> None:
    """Write an nvcc that only prints its toolkit and version."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..'\necho 'V{version}'\n")
    nvcc.chmod(0o755)


def keep_kernels(project: Path, *names: str) -> None:
    """Remove all other kernels from the table, because compiling them takes minutes."""
    with (project / "jvp_attn" / "backends" / "kernel_table.py").open("a") as table:
        table.write(f"KERNELS = {{name: KERNELS[name] for name in {names}}}\n")


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pip_wheel(project: Path) -> subprocess.CompletedProcess[str]:
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "wheel", "--verbose", *offline]
    return run(*pip, "--wheel-dir", "dist", ".", cwd=project)


def notices(output: str) -> list[str]:
    lines = [line.strip() for line in output.splitlines()]
    return [line for line in lines if line.startswith("jvp-attn: ")]


def only_file(folder: Path, pattern: str) -> Path:
    [path] = folder.glob(pattern)
    return path


def names_in_wheel(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def modules_of(project: Path) -> set[str]:
    files = [path for package in ("jvp_attn", "rcm") for path in (project / package).rglob("*")]
    return {str(path.relative_to(project)) for path in files if path.is_file()}


def info_after_installing(wheel: Path, venv: Path) -> dict:
    """Install into a new venv that borrows this one's other packages, and run jvp_attn.info."""
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    site_packages = only_file(venv, "lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python]
    installed = run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=venv.parent)
    assert installed.returncode == 0, installed.stdout
    said = run(python, "-m", "jvp_attn.info", "--json", cwd=venv.parent)
    assert said.returncode == 0, said.stdout
    return json.loads(said.stdout)
