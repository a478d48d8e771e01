"""Builds the extensions: `jvp_attn._cpu` with a C++ compiler, `jvp_attn._C` with nvcc.

An extension that cannot be built is skipped with a warning; the package works without it.
`JVP_ATTN_CPU=1` and `JVP_ATTN_CUDA=1` turn that warning into an error; `JVP_ATTN_CPU=0` and
`JVP_ATTN_CUDA=0` skip an extension. `CXX` chooses the C++ compiler, `TORCH_CUDA_ARCH_LIST` the GPUs
to compile for (as in PyTorch), `MAX_JOBS` the number of parallel compilers, `NVCC_APPEND_FLAGS`
further options of nvcc. `V=1` shows the commands of nvcc. Neither extension needs torch to compile.
All other metadata is in pyproject.toml.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Build frontends run these to collect requirements, metadata and sources. They compile nothing.
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist"}

# -ffp-contract=fast allows fused multiply-adds. -Wno-psabi: functions that pass vectors by value
# are inlined, so their ABI does not matter.
CPU_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-pthread", "-Wall", "-Wextra"]
CPU_FLAGS += ["-Wno-psabi", "-fvisibility=hidden"]

# A source that the C++ compiler must accept.
PROBE = """
#include <atomic>
typedef float Vector __attribute__((vector_size(16)));
void publish(std::atomic<int>& x, Vector& y) { x.notify_all(); y = y > y ? y : y + y; }
"""

# csrc/generate.py writes the sources of the CUDA kernels here.
KERNEL_SOURCES = Path("build/kernels")

# The objects of the CUDA extension, and beside each object of nvcc, in *.o.log, the report of ptxas
# on registers and spills. tests/compile_gate reads both.
CUDA_OBJECTS = Path("build/objects")

LICENSE = "Apache-2.0"

DEFAULT_ARCH_LIST = "8.0 9.0+PTX"

# The first CUDA whose ptxas has every instruction of the kernels: red with vector types is the
# newest, of PTX 8.1.
MIN_CUDA = (12, 1)


@dataclass(frozen=True)
class Toolkit:
    """Where a CUDA toolkit lives, and the version of its nvcc, such as "13.0.88"."""

    root: Path
    version: str


def main() -> None:
    if METADATA_COMMANDS.intersection(sys.argv):
        setup(license=LICENSE)
        return

    extensions = []
    if is_wanted("CPU", why_no_compiler() or why_no_pybind11()):
        extensions.append(cpu_extension())
    toolkit = None if requested("JVP_ATTN_CUDA") == "0" else find_toolkit()
    if is_wanted("CUDA", why_no_cuda(toolkit) or why_no_pybind11()):
        extensions.append(cuda_extension(toolkit))
    setup(license=LICENSE, ext_modules=extensions, cmdclass={"build_ext": Build})


def requested(variable: str) -> str:
    value = os.environ.get(variable) or "automatic"
    if value not in {"0", "1", "automatic"}:
        fail(f"{variable} is {value!r}; it can be 0, 1 or unset.")
    return value


def is_wanted(name: str, obstacle: str | None) -> bool:
    """Whether to build an extension. Warns if it cannot be built; fails if it is required."""
    variable = f"JVP_ATTN_{name}"
    value = requested(variable)
    if value == "0":
        return False
    if value == "1" and obstacle:
        fail(f"{variable}=1 requires the {name} extension, but it cannot be built: {obstacle}.")
    if obstacle:
        notice(f"{obstacle}: skipping the {name} extension.")
    return not obstacle


def notice(text: str) -> None:
    print(f"jvp-attn: {text}", file=sys.stderr)


def fail(text: str) -> NoReturn:
    sys.exit(f"jvp-attn: {text}")


def find_toolkit() -> Toolkit | None:
    """Find the toolkit of the nvcc in CUDA_HOME, CUDA_PATH or PATH, in that order."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [os.path.join(home, "bin") for home in homes] + [os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        return None

    # This nvcc may be a link or a wrapper outside the toolkit. Only nvcc itself knows its home.
    plan = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull)
    root = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    version = re.search(r"\bV(\d+\.\d+\.\d+)", output_of(nvcc, "--version"))
    if not (root and version):
        fail(f"{nvcc} does not run as nvcc should. JVP_ATTN_CUDA=0 skips the CUDA extension.")
    return Toolkit(Path(root[1].strip()).resolve(), version[1])


def output_of(*command: str) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.stdout


def why_no_cuda(toolkit: Toolkit | None) -> str | None:
    if toolkit is None:
        return "no nvcc in CUDA_HOME, CUDA_PATH or PATH"
    if tuple(map(int, toolkit.version.split(".")))[:2] < MIN_CUDA:
        needed = ".".join(map(str, MIN_CUDA))
        return (
            f"the nvcc in {toolkit.root} is version {toolkit.version}, and the kernels need CUDA "
            f"{needed} or newer (CUDA_HOME chooses another, JVP_ATTN_CUDA=0 none)"
        )
    return None if find_ninja() else "ninja is not installed"


def find_ninja() -> str | None:
    """Find ninja in PATH, or beside the running Python where pip installs it."""
    folders = [os.environ.get("PATH", ""), sysconfig.get_path("scripts")]
    return shutil.which("ninja", path=os.pathsep.join(folders))


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def why_no_compiler() -> str | None:
    command = cxx()
    with tempfile.TemporaryDirectory() as folder:
        probe, result = Path(folder, "probe.cpp"), Path(folder, "probe.o")
        probe.write_text(PROBE)
        try:
            output_of(*command, *CPU_FLAGS, "-c", str(probe), "-o", str(result))
        except OSError as error:
            return f"no C++ compiler ({error})"
        if not result.exists():
            return f"{command[0]} does not compile C++20 with GCC's vector extensions"
    return None


def why_no_pybind11() -> str | None:
    return None if pybind11_headers() else "neither pybind11 nor torch, which has it, is installed"


def pybind11_headers() -> str | None:
    for package in ("pybind11", "torch"):
        if spec := importlib.util.find_spec(package):
            return str(Path(spec.origin).parent / "include")
    return None


def cpu_extension() -> Extension:
    """Describe `jvp_attn._cpu`, which does not use torch."""
    folder = Path("csrc/cpu")
    return Extension(
        "jvp_attn._cpu",
        sources=[str(path) for path in sorted(folder.glob("*.cpp"))],
        depends=["setup.py", "csrc/common/bindings.h", *map(str, sorted(folder.glob("*.h")))],
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=[*CPU_FLAGS, "-isystem", pybind11_headers()],
        extra_link_args=["-pthread", "-ldl"],
        language="c++",
    )


def cuda_extension(toolkit: Toolkit) -> Extension:
    """Describe `jvp_attn._C`, which uses pybind11 and the CUDA runtime but not torch.

    Its own CUDA runtime, linked in, may differ from torch's.
    """
    targets = code_targets(arch_list())
    definitions = {
        "JVP_ATTN_ARCHS": " ".join(targets),
        "JVP_ATTN_NVCC_VERSION": toolkit.version,
        "JVP_ATTN_GIT_HASH": git_hash(),
    }
    common = ["-std=c++17", "-O3", "-Icsrc"]
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    cxx_command = [*cxx(), *common, "-DNDEBUG", *host, "-isystem", pybind11_headers()]
    cxx_command += ["-isystem", sysconfig.get_path("include")]
    cxx_command += [f'-D{name}="{value}"' for name, value in definitions.items()]
    nvcc_command = [str(toolkit.root / "bin" / "nvcc"), *common, "-Xcompiler", ",".join(host)]
    nvcc_command += ["--expt-relaxed-constexpr", "-Xptxas", "-v"]
    nvcc_command += [f"-gencode=arch={t.replace('sm', 'compute')},code={t}" for t in targets]
    if os.environ.get("CXX"):
        nvcc_command += ["-ccbin", cxx()[-1]]
    # nvcc reads these itself. In the command they make ninja compile anew when they change.
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        if flags := os.environ.get(name):
            nvcc_command = ["env", f"{name}={flags}", *nvcc_command]

    objects = {CUDA_OBJECTS / f"{source.stem}.o": source for source in sources(targets)}
    CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)
    (CUDA_OBJECTS / "build.ninja").write_text(ninja_file(objects, cxx_command, nvcc_command))
    return Extension(
        "jvp_attn._C",
        sources=[],
        depends=[str(path) for path in objects],
        extra_objects=[str(path) for path in objects],
        library_dirs=[str(toolkit.root / folder) for folder in ("lib64", "lib")],
        libraries=["cudart_static", "dl", "pthread", "rt"],
        # torch may load another CUDA runtime into the same process: keep this one's names private.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        language="c++",
    )


def sources(targets: list[str]) -> list[Path]:
    """Find the sources in csrc/ and generate those of the kernels. These take longest: last."""
    bindings = sorted(path for path in Path("csrc").glob("*") if path.suffix in {".cpp", ".cu"})
    generator = runpy.run_path("csrc/generate.py")
    # Kernels for compute capability 9.0 are empty in code for any other.
    archs = {"sm80", "sm90"} if "sm_90a" in targets else {"sm80"}
    kernels = [kernel for kernel in generator["kernel_table"]() if kernel.arch in archs]
    return [*bindings, *generator["generate"](KERNEL_SOURCES, kernels)]


# nvcc's output goes to a log. The compiler's warnings, and ptxas' "(C7510) Potential Performance
# Loss", are printed too; the rest of the report of `ptxas -v` is not.
NINJA_RULES = r"""
builddir = build/objects
rule cxx
  command = $cxx -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $name
rule nvcc
  command = $nvcc -MD -MF $out.d -c $in -o $out >$out.log 2>&1; status=$$?; $
    grep -vE '^ptxas info +: [^(]|bytes stack frame|^$$' $out.log; exit $$status
  depfile = $out.d
  deps = gcc
  description = $name
"""


def ninja_file(objects: dict[Path, Path], cxx: list[str], nvcc: list[str]) -> str:
    """Write the rules that compile each object from its source."""
    lines = [f"cxx = {shlex.join(cxx)}", f"nvcc = {shlex.join(nvcc)}", NINJA_RULES]
    for target, source in objects.items():
        if source.suffix == ".cu":
            lines.append(f"build {target} | {target}.log: nvcc {source}")
        else:
            lines.append(f"build {target}: cxx {source}")
        lines.append(f"  name = {source.stem}")
    return "\n".join(lines) + "\n"


def run_ninja() -> None:
    """Compile what changed, and show progress: one line of it on a terminal, else ten."""
    command = [find_ninja(), "-f", str(CUDA_OBJECTS / "build.ninja")]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    if os.environ.get("V") == "1":
        subprocess.run([*command, "-v"], check=True)
        return
    environment = {**os.environ, "NINJA_STATUS": "CUDA kernels: [%f/%t] "}
    if sys.stdout.isatty():
        subprocess.run(command, env=environment, check=True)
        return
    tenths = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as ninja:
        for line in ninja.stdout:
            if progress := re.match(r"CUDA kernels: \[(\d+)/(\d+)\]", line):
                done, total = map(int, progress.groups())
                if done * 10 // total == tenths:
                    continue
                tenths = done * 10 // total
            print(line, end="", flush=True)
    if ninja.returncode:
        raise subprocess.CalledProcessError(ninja.returncode, command)


def arch_list() -> str:
    """List the GPUs to compile for, as TORCH_CUDA_ARCH_LIST does: "8.0 9.0+PTX"."""
    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return requested
    try:
        found = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except OSError:
        return DEFAULT_ARCH_LIST
    return " ".join(sorted(set(re.findall(r"^\d+\.\d$", found, re.M)))) or DEFAULT_ARCH_LIST


def code_targets(arch_list: str) -> list[str]:
    """Turn "8.0 9.0+PTX" into nvcc's names: sm_80 is machine code, compute_90 is PTX."""
    targets = []
    for arch in arch_list.replace(";", " ").split():
        if not (match := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)):
            fail(f'cannot read {arch!r} in TORCH_CUDA_ARCH_LIST; write it as in "8.0;9.0+PTX".')
        major, minor, variant, ptx = match.groups()
        if int(major) < 8:
            notice(
                f"skipping architecture {arch}: the kernels need compute capability 8.0 or newer."
            )
            continue
        # wgmma needs sm_90a. Every GPU of capability 9.0 runs it.
        targets.append(f"sm_{major}{minor}" + ("a" if major == "9" else variant))
        # Newer GPUs run PTX, except that of a variant such as 90a.
        if ptx:
            targets.append(f"compute_{major}{minor}")
    if not targets:
        fail("TORCH_CUDA_ARCH_LIST has no architecture to compile for.")
    return targets


def git_hash() -> str:
    """The commit in this folder, with "-dirty" if files differ; "unknown" in an sdist."""
    # Without --git-dir, an sdist unpacked inside another repository would report its commit.
    git = ["git", "--git-dir=.git", "--work-tree=."]
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run([*git, *describe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


class Build(build_ext):
    """Compiles the CUDA extension with ninja. Says what to do where a compiler fails."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            names = " or ".join(extension.name for extension in self.extensions)
            fail(
                f"{names} did not compile: {error}\nThe compiler's messages are above.\n"
                "JVP_ATTN_CPU=0 and JVP_ATTN_CUDA=0 skip an extension, CXX chooses another C++\n"
                "compiler, CUDA_HOME another toolkit, TORCH_CUDA_ARCH_LIST other GPUs."
            )

    def build_extension(self, extension: Extension) -> None:
        if extension.name == "jvp_attn._C":
            run_ninja()
        super().build_extension(extension)


if __name__ == "__main__":
    main()
