"""Wheels and the sdist: their contents, and which extensions they build on which machine."""

import re
import sys
import tarfile
from pathlib import Path

import pytest

from tests.package.project import (
    info_after_installing,
    keep_kernels,
    modules_of,
    names_in_wheel,
    needs_nvcc,
    notices,
    only_file,
    pip_wheel,
    run,
    setup_py,
)

# Without nvcc.


@pytest.mark.usefixtures("no_nvcc")
def test_without_compilers_the_package_is_pure_python(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JVP_ATTN_CPU")
    monkeypatch.setenv("CXX", "no-compiler")
    result = pip_wheel(project)
    assert result.returncode == 0, result.stdout
    assert notices(result.stdout) == [
        "jvp-attn: no C++ compiler ([Errno 2] No such file or directory: 'no-compiler'): "
        "skipping the CPU extension.",
        "jvp-attn: no nvcc in CUDA_HOME, CUDA_PATH or PATH: skipping the CUDA extension.",
    ]
    wheel = only_file(project / "dist", "*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    modules = {name for name in names_in_wheel(wheel) if ".dist-info/" not in name}
    assert modules == modules_of(project)

    info = info_after_installing(wheel, tmp_path / "venv")
    assert info["available_backends"] == ["tiled", "math"]
    assert "jvp_attn._cpu" in info["cpu_extension"]["import_error"]
    assert "jvp_attn._C" in info["extension"]["import_error"]


@pytest.mark.usefixtures("no_nvcc")
def test_nvcc_can_be_required(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_CUDA", "1")
    result = pip_wheel(project)
    assert result.returncode != 0
    assert notices(result.stdout)[-1] == (
        "jvp-attn: JVP_ATTN_CUDA=1 requires the CUDA extension, but it cannot be built: "
        "no nvcc in CUDA_HOME, CUDA_PATH or PATH."
    )


@pytest.mark.usefixtures("fake_nvcc")
def test_both_extensions_can_be_skipped(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_CUDA", "0")
    result = pip_wheel(project)
    assert notices(result.stdout) == []
    assert only_file(project / "dist", "*.whl").name.endswith("-py3-none-any.whl")


# With a C++ compiler.


@pytest.mark.usefixtures("no_nvcc")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-compiler", "no C++ compiler ([Errno 2] No such file or directory: 'no-compiler')"),
        ("false", "false does not compile C++20 with GCC's vector extensions"),
    ],
)
def test_a_compiler_can_be_required(
    compiler: str, reason: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JVP_ATTN_CPU", "1")
    monkeypatch.setenv("CXX", compiler)
    result = pip_wheel(project)
    assert result.returncode != 0
    assert notices(result.stdout) == [
        f"jvp-attn: JVP_ATTN_CPU=1 requires the CPU extension, but it cannot be built: {reason}."
    ]


@pytest.mark.usefixtures("no_nvcc", "no_torch")
@pytest.mark.slow
def test_a_compiler_alone_builds_the_cpu_kernels(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JVP_ATTN_CPU", "1")
    result = pip_wheel(project)
    assert result.returncode == 0, result.stdout
    assert not re.search(r"csrc/\S+: warning", result.stdout), result.stdout
    wheel = only_file(project / "dist", "*.whl")
    modules = {name for name in names_in_wheel(wheel) if ".dist-info/" not in name}
    [extension] = modules - modules_of(project)
    assert extension.startswith("jvp_attn/_cpu.")

    monkeypatch.delenv("PYTHONPATH")
    info = info_after_installing(wheel, tmp_path / "venv")
    assert info["available_backends"] == ["tiled", "cpu", "math"]
    assert info["cpu_extension"]["instruction_sets"][-1] == "baseline"


@pytest.mark.usefixtures("no_nvcc")
def test_cpu_kernels_that_do_not_compile_say_what_to_do(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JVP_ATTN_CPU", "1")
    (project / "csrc" / "cpu" / "bindings.cpp").write_text("#error broken on purpose\n")
    result = pip_wheel(project)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout
    assert "jvp_attn._cpu did not compile" in result.stdout
    assert "JVP_ATTN_CPU=0" in result.stdout


# The archives.


def test_the_sdist_is_the_whole_project(project: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"]
    result = run(*build, cwd=project)
    assert result.returncode == 0, result.stdout
    with tarfile.open(only_file(project / "dist", "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    top = {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    folders = [project / folder for folder in ("benchmarks", "csrc", "docs", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    expected = modules_of(project) | top | {str(path.relative_to(project)) for path in files}
    assert expected <= names


@needs_nvcc
@pytest.mark.slow
def test_an_sdist_becomes_a_wheel_with_the_extension(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_kernels(project, "forward_bf16_d64", "preprocess_fp16")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    result = run(sys.executable, "-m", "build", "--no-isolation", cwd=project)
    assert result.returncode == 0, result.stdout
    assert not re.search(r"csrc/\S+: warning", result.stdout), result.stdout

    wheel = only_file(project / "dist", "*.whl")
    modules = {name for name in names_in_wheel(wheel) if ".dist-info/" not in name}
    [extension] = modules - modules_of(project)
    assert extension.startswith("jvp_attn/_C.")

    info = info_after_installing(wheel, tmp_path / "venv")
    assert info["available_backends"] == ["tiled", "cuda", "math"]
    build = info["extension"]["build"]
    assert build["archs"] == ["sm_90a", "compute_90"]
    assert build["nvcc"] == setup_py.find_toolkit().version
    assert build["git_hash"] == "unknown"

    python = tmp_path / "venv" / "bin" / "python"
    ask = "from jvp_attn import _C; print(*(f'{x} {y}' for x, y in sorted(_C.kernels().items())))"
    described = run(python, "-c", ask, cwd=tmp_path).stdout
    assert re.fullmatch(
        r"forward_bf16_d64 \{'threads': 128, 'shared_bytes': \d+\} "
        r"preprocess_fp16 \{'threads': 128, 'shared_bytes': 0\}\n",
        described,
    ), described


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_that_do_not_compile_say_what_to_do(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_kernels(project, "preprocess_bf16")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with (project / "csrc" / "bindings.cpp").open("a") as source:
        source.write("\n#error broken on purpose\n")
    result = pip_wheel(project)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout
    assert "jvp_attn._C did not compile" in result.stdout
    assert "JVP_ATTN_CUDA=0" in result.stdout
