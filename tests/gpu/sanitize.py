"""Runs every kernel under compute-sanitizer: `python -m tests.gpu.sanitize [TOOL ...]`.

memcheck finds accesses out of bounds, racecheck finds races in shared memory, and synccheck finds
barriers that not all threads reach. The kernels run on the small problems of tests/kernels, in
test_gpu_kernels.py. The exit status is 1 if a tool finds an error or a test fails. Needs a GPU, the
CUDA extension, and compute-sanitizer, which is part of the CUDA toolkit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck")
TESTS = "tests/gpu/test_gpu_kernels.py"

# Exit status of the tool, different from those of pytest.
TOOL_FOUND_ERRORS = 99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; all")
    tools = parser.parse_args().tools or TOOLS
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"there is no tool {', '.join(sorted(unknown))}; there are {', '.join(TOOLS)}")
    sanitizer = find_sanitizer()
    if failed := [tool for tool in tools if not passes(sanitizer, tool)]:
        sys.exit(f"failed: {', '.join(failed)}")
    print(f"passed: {', '.join(tools)}")


def find_sanitizer() -> Path:
    """compute-sanitizer in PATH, or in the toolkit that the build uses."""
    folders = os.environ["PATH"].split(os.pathsep)
    if toolkit := run_path(str(ROOT / "setup.py"))["find_toolkit"]():
        folders += [str(toolkit.root / "bin"), str(toolkit.root / "compute-sanitizer")]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        sys.exit("compute-sanitizer is neither in PATH nor in the CUDA toolkit: install it there")
    return Path(found)


def passes(sanitizer: Path, tool: str) -> bool:
    """Whether the tests pass under a tool, and it finds no errors."""
    print(f"--- {tool}", flush=True)
    command = [
        *(str(sanitizer), "--tool", tool, "--error-exitcode", str(TOOL_FOUND_ERRORS)),
        *(sys.executable, "-m", "pytest", "-m", "cuda", "-rs", TESTS),
    ]
    # With one allocation for each tensor, memcheck knows its bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(result.stdout)
    if result.returncode == TOOL_FOUND_ERRORS:
        print(f"{tool} found errors; they are above")
    # A skipped test is a failure.
    return result.returncode == 0 and " skipped" not in result.stdout


if __name__ == "__main__":
    main()
