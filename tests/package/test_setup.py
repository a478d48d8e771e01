"""The parts of setup.py: the toolkit, the architectures, the git hash, what a build downloads."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.package.project import ROOT, run, setup_py, write_fake_nvcc

pytestmark = pytest.mark.usefixtures("neutral_environment")


def test_the_toolkit_is_the_one_that_nvcc_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrappers, toolkit = tmp_path / "wrappers", tmp_path / "cuda"
    write_fake_nvcc(wrappers, toolkit)
    monkeypatch.setenv("PATH", str(wrappers), prepend=os.pathsep)
    assert setup_py.find_toolkit() == setup_py.Toolkit(toolkit, "13.0.88")


def test_cuda_home_precedes_path(
    tmp_path: Path, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    write_fake_nvcc(other / "bin", other)
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert setup_py.find_toolkit().root == other


def test_an_nvcc_that_does_not_run_is_named(fake_nvcc: Path) -> None:
    (fake_nvcc / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(SystemExit, match="bin/nvcc does not run"):
        setup_py.find_toolkit()


@pytest.mark.parametrize("version", ["9.2.148", "11.8.89", "12.0.140"])
def test_an_older_nvcc_is_named_with_what_is_needed(fake_nvcc: Path, version: str) -> None:
    write_fake_nvcc(fake_nvcc / "bin", fake_nvcc, version)
    assert setup_py.why_no_cuda(setup_py.find_toolkit()) == (
        f"the nvcc in {fake_nvcc} is version {version}, and the kernels need CUDA 12.1 or newer "
        "(CUDA_HOME chooses another, JVP_ATTN_CUDA=0 none)"
    )


@pytest.mark.parametrize("version", ["12.1.66", "12.10.1", "13.0.88"])
def test_a_newer_nvcc_builds_the_kernels(fake_nvcc: Path, version: str) -> None:
    write_fake_nvcc(fake_nvcc / "bin", fake_nvcc, version)
    assert setup_py.why_no_cuda(setup_py.find_toolkit()) is None


@pytest.mark.parametrize(
    ("arch_list", "targets"),
    [
        (setup_py.DEFAULT_ARCH_LIST, ["sm_80", "sm_90a", "compute_90"]),
        ("8.6;9.0a+PTX", ["sm_86", "sm_90a", "compute_90"]),
        ("7.5 10.0a 12.0+PTX", ["sm_100a", "sm_120", "compute_120"]),
    ],
)
def test_an_arch_list_becomes_code_targets(arch_list: str, targets: list[str]) -> None:
    assert setup_py.code_targets(arch_list) == targets


@pytest.mark.parametrize(
    ("arch_list", "reason"), [("Hopper", "'Hopper'"), ("7.5", "no architecture")]
)
def test_an_arch_list_without_usable_architecture_is_refused(arch_list: str, reason: str) -> None:
    with pytest.raises(SystemExit, match=reason):
        setup_py.code_targets(arch_list)


def test_git_hash_tells_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert setup_py.git_hash() == "unknown"

    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / "file"
    file.write_text("one")
    run("git", "init", cwd=tmp_path)
    run("git", "add", "file", cwd=tmp_path)
    run("git", *who, "commit", "--message", "one", cwd=tmp_path)
    head = run("git", "rev-parse", "HEAD", cwd=tmp_path).stdout
    assert setup_py.git_hash() == head[:12]

    file.write_text("two")
    assert setup_py.git_hash() == head[:12] + "-dirty"

    unpacked_sdist = tmp_path / "sdist"
    unpacked_sdist.mkdir()
    monkeypatch.chdir(unpacked_sdist)
    assert setup_py.git_hash() == "unknown"


@pytest.mark.usefixtures("fake_nvcc")
def test_without_ninja_there_is_no_cuda_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = setup_py.find_toolkit()
    assert setup_py.why_no_cuda(toolkit) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup_py.why_no_cuda(toolkit) == "ninja is not installed"


@pytest.mark.parametrize(
    ("capabilities", "arch_list"),
    [("9.0\n9.0\n8.6\n", "8.6 9.0"), ("No devices were found\n", setup_py.DEFAULT_ARCH_LIST)],
)
def test_kernels_are_compiled_for_the_gpus_that_are_present(
    capabilities: str, arch_list: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{capabilities}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert setup_py.arch_list() == arch_list


def test_ninja_reports_progress_in_tenths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    objects = {Path(f"{i}.o"): Path(f"{i}.cpp") for i in range(30)}
    for source in objects.values():
        source.touch()
    setup_py.CUDA_OBJECTS.mkdir(parents=True)
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\n: >"$3"; cp "$5" "$7"\n')  # -MMD -MF $out.d -c $in -o $out
    compiler.chmod(0o755)
    text = setup_py.ninja_file(objects, [str(compiler)], [])
    (setup_py.CUDA_OBJECTS / "build.ninja").write_text(text)
    setup_py.run_ninja()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("CUDA kernels: [30/30]")

    compiler.write_text("#!/bin/sh\necho broken on purpose\nexit 1\n")
    (tmp_path / "7.o").unlink()
    with pytest.raises(subprocess.CalledProcessError):
        setup_py.run_ninja()
    assert "broken on purpose" in capfd.readouterr().out


@pytest.mark.usefixtures("fake_nvcc")
def test_flags_for_nvcc_compile_anew_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    commands = []
    monkeypatch.setitem(
        setup_py.cuda_extension.__globals__,
        "ninja_file",
        lambda objects, cxx, nvcc: commands.append(nvcc) or "",
    )
    monkeypatch.setitem(setup_py.cuda_extension.__globals__, "sources", lambda targets: [])
    monkeypatch.setitem(setup_py.cuda_extension.__globals__, "CUDA_OBJECTS", tmp_path / "objects")
    for flags in ("", "-DNAME=0", "-DNAME=1 -lineinfo"):
        monkeypatch.setenv("NVCC_APPEND_FLAGS", flags)
        setup_py.cuda_extension(setup_py.find_toolkit())
    assert commands[0][0].endswith("bin/nvcc")
    assert [x[:2] for x in commands[1:]] == [
        ["env", "NVCC_APPEND_FLAGS=-DNAME=0"],
        ["env", "NVCC_APPEND_FLAGS=-DNAME=1 -lineinfo"],
    ]


# What an isolated build downloads.

ASK_REQUIREMENTS = """
from setuptools.build_meta import get_requires_for_build_wheel
print("needs", *get_requires_for_build_wheel())
"""


@pytest.mark.usefixtures("fake_nvcc", "no_torch")
def test_a_build_needs_nothing_beyond_pyproject(project: Path) -> None:
    """Not torch, which is a large download."""
    assert "needs\n" in run(sys.executable, "-c", ASK_REQUIREMENTS, cwd=project).stdout
