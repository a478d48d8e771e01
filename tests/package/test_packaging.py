"""What installing this repository does, with nvcc and without it, and what the archives hold."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
setup_py = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))

needs_nvcc = pytest.mark.skipif(setup_py.find_toolkit() is None, reason="nvcc is not installed")


# The world outside: a fresh copy of the project, and a machine with or without tools.


@pytest.fixture
def project(tmp_path: Path) -> Path:
    made_by_tools = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    ignore = shutil.ignore_patterns(*made_by_tools)
    return shutil.copytree(ROOT, tmp_path / "project", ignore=ignore)


@pytest.fixture(autouse=True)
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


def write_fake_nvcc(folder: Path, toolkit: Path) -> None:
    """Write an nvcc that only says which toolkit it belongs to."""
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..'\necho 'release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toolkit = tmp_path / "cuda"
    write_fake_nvcc(toolkit / "bin", toolkit)
    monkeypatch.setenv("PATH", str(toolkit / "bin"), prepend=os.pathsep)
    return toolkit


def keep_kernels(project: Path, *names: str) -> None:
    """Strike all others from the kernel table: compiling them takes minutes."""
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
    """Install into a new venv that borrows only torch and its like, and ask the package there."""
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
        "the CPU extension is left out.",
        "jvp-attn: no nvcc in CUDA_HOME, CUDA_PATH or PATH: the CUDA extension is left out.",
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
        "jvp-attn: JVP_ATTN_CUDA=1 asks for the CUDA extension, but it cannot be built: "
        "no nvcc in CUDA_HOME, CUDA_PATH or PATH."
    )


@pytest.mark.usefixtures("fake_nvcc", "no_torch")
def test_torch_can_be_required(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_CUDA", "1")
    result = pip_wheel(project)
    assert result.returncode != 0
    assert notices(result.stdout)[-1] == (
        "jvp-attn: JVP_ATTN_CUDA=1 asks for the CUDA extension, but it cannot be built: "
        "torch cannot be imported (torch is hidden)."
    )


@pytest.mark.usefixtures("fake_nvcc")
def test_the_extension_can_be_declined(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_CUDA", "0")
    result = pip_wheel(project)
    assert notices(result.stdout) == [
        "jvp-attn: JVP_ATTN_CPU=0: the CPU extension is left out.",
        "jvp-attn: JVP_ATTN_CUDA=0: the CUDA extension is left out.",
    ]
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
        f"jvp-attn: JVP_ATTN_CPU=1 asks for the CPU extension, but it cannot be built: {reason}."
    ]


@pytest.mark.usefixtures("no_nvcc", "no_torch")
@pytest.mark.slow
def test_a_compiler_alone_builds_the_kernels_of_the_cpu(
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
def test_kernels_that_do_not_compile_say_what_to_do(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JVP_ATTN_CPU", "1")
    (project / "csrc" / "cpu" / "bindings.cpp").write_text("#error broken on purpose\n")
    result = pip_wheel(project)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout
    assert "jvp_attn._cpu did not compile" in result.stdout
    assert "JVP_ATTN_CPU=0" in result.stdout


# What an isolated build downloads.

ASK_REQUIREMENTS = """
from setuptools.build_meta import get_requires_for_build_wheel
print("needs", *get_requires_for_build_wheel())
"""


@pytest.mark.usefixtures("no_nvcc")
def test_without_nvcc_a_build_needs_no_torch(project: Path) -> None:
    assert "needs\n" in run(sys.executable, "-c", ASK_REQUIREMENTS, cwd=project).stdout


@pytest.mark.usefixtures("fake_nvcc")
def test_a_declined_extension_needs_no_torch(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JVP_ATTN_CUDA", "0")
    assert "needs\n" in run(sys.executable, "-c", ASK_REQUIREMENTS, cwd=project).stdout


@pytest.mark.usefixtures("fake_nvcc", "no_torch")
def test_with_nvcc_a_build_asks_for_torch(project: Path) -> None:
    answer = run(sys.executable, "-c", ASK_REQUIREMENTS, cwd=project).stdout
    assert "needs torch>=2.11 ninja\n" in answer


# The parts of setup.py.


def test_the_toolkit_is_the_one_that_nvcc_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrappers, toolkit = tmp_path / "wrappers", tmp_path / "cuda"
    write_fake_nvcc(wrappers, toolkit)
    monkeypatch.setenv("PATH", str(wrappers), prepend=os.pathsep)
    assert setup_py.find_toolkit() == setup_py.Toolkit(toolkit, "13.0.88")


def test_cuda_home_goes_before_path(
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


@pytest.mark.parametrize(("arch_list", "reason"), [("Hopper", "'Hopper'"), ("7.5", "no arch")])
def test_an_arch_list_that_leads_nowhere_is_refused(arch_list: str, reason: str) -> None:
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


# The archives.


def test_the_sdist_is_the_whole_project(project: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"]
    result = run(*build, cwd=project)
    assert result.returncode == 0, result.stdout
    with tarfile.open(only_file(project / "dist", "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    top = {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    folders = [project / folder for folder in ("csrc", "tests", "benchmarks")]
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
def test_a_failed_compilation_says_what_to_do(
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
