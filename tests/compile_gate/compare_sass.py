"""Compares the machine code of two builds, kernel by kernel and architecture by architecture.

    python -m tests.compile_gate.compare_sass BEFORE AFTER [--rename OLD=NEW ...]

BEFORE and AFTER are folders of object files or cubins, searched recursively; a file is named after
its kernel and holds no other. Kernels count as equal if their instructions differ at most in the
numbers of registers and predicates and in the names of constants and symbols. Each other kernel
gets a line, then a summary follows; the exit status is 1 if there was such a line. Needs cuobjdump
(PyPI: nvidia-cuda-cuobjdump) and nvdisasm (PyPI: nvidia-cuda-nvdisasm), no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from pathlib import Path

from tests.compile_gate.cuda_tools import cuda_tool

# A kernel's name and an architecture.
Key = tuple[str, str]

IDENTICAL = "identical"
RENUMBERED = "registers renumbered"

_ARCH = re.compile(r"^arch = (\w+)$|^\s*\.target\s+(\w+)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function : \S+$", re.MULTILINE)
# "        /*0070*/               @P0 BRA 0x340 ;          /* 0x0000000000b00947 */"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;", re.MULTILINE)

# What the compiler chooses without a meaning of its own, and what stands for it.
_NAMES = (
    (re.compile(r"\.reuse\b"), ""),
    (re.compile(r"\b(U?[RP]|B)\d+\b"), r"\1"),
    (re.compile(r"\bc\[0x[0-9a-f]+\]"), "c[]"),
    (re.compile(r"\(_Z\w+\)|\(\.L_\w+\)|\$\w+"), "()"),
)


# ----------------------------------------------------------------------------
# Reading


def read_build(folder: Path, pattern: str = "*") -> dict[Key, list[str]]:
    """Disassemble every object file and cubin below a folder.

    Args:
        folder: searched recursively.
        pattern: which kernels to read.

    Returns:
        The instructions of each kernel and architecture. Kernels without instructions of their
        own, because they are for another architecture, are left out.

    Raises:
        FileNotFoundError: cuobjdump or nvdisasm is not installed.
        ValueError: the folder holds no kernel that fits the pattern.
    """
    # cuobjdump calls nvdisasm, which it looks for in PATH.
    path = os.pathsep.join([str(cuda_tool("nvdisasm").parent), os.environ.get("PATH", "")])
    kernels: dict[Key, list[str]] = {}
    for file in sorted([*folder.rglob("*.o"), *folder.rglob("*.cubin")]):
        if fnmatchcase(file.stem, pattern):
            text = subprocess.run(
                [str(cuda_tool("cuobjdump")), "-sass", str(file)],
                env={**os.environ, "PATH": path},
                capture_output=True,
                check=True,
                text=True,
            ).stdout
            for arch, instructions in read_sass(text).items():
                kernels[file.stem, arch] = instructions
    if not kernels:
        raise ValueError(f"{folder} holds no kernel that fits {pattern}")
    return kernels


def read_sass(text: str) -> dict[str, list[str]]:
    """Read what `cuobjdump -sass` prints for one kernel: its instructions by architecture."""
    kernels: dict[str, list[str]] = {}
    functions = [*_FUNCTION.finditer(text)]
    ends = [*(function.start() for function in functions[1:]), len(text)]
    for function, end in zip(functions, ends, strict=True):
        arch = next(x for x in _ARCH.findall(text[: function.start()])[-1] if x)
        found = _INSTRUCTION.findall(text[function.end() : end])
        instructions = [" ".join(x.split()) for x in found]
        while instructions and instructions[-1].startswith(("NOP", "BRA")):
            instructions.pop()  # the padding of the last line of the instruction cache
        if len(instructions) > 2:  # an empty kernel loads the stack pointer and exits
            kernels[arch] = instructions
    return kernels


# ----------------------------------------------------------------------------
# Comparing


def normalised(instruction: str) -> str:
    """An instruction without the numbers of registers and the names of constants."""
    for pattern, replacement in _NAMES:
        instruction = pattern.sub(replacement, instruction)
    return instruction


def compare(before: list[str], after: list[str]) -> str:
    """IDENTICAL, RENUMBERED, or what differs."""
    if before == after:
        return IDENTICAL
    old, new = [*map(normalised, before)], [*map(normalised, after)]
    if old == new:
        return RENUMBERED
    # Branches move with the code that they leap over.
    blocks = SequenceMatcher(None, _without_targets(old), _without_targets(new), autojunk=False)
    same = sum(block.size for block in blocks.get_matching_blocks())
    removed, added = Counter(_names(old)), Counter(_names(new))
    changes = [f"-{n} {x}" for x, n in sorted((removed - added).items())]
    changes += [f"+{n} {x}" for x, n in sorted((added - removed).items())]
    return (
        f"{len(old)} -> {len(new)} instructions, {same} in common order; "
        f"{', '.join(changes) or 'only the order or the operands changed'}"
    )


def _names(instructions: Iterable[str]) -> list[str]:
    return [re.sub(r"^@!?\w+ ", "", x).split(" ")[0] for x in instructions]


def _without_targets(instructions: Iterable[str]) -> list[str]:
    return [re.sub(r"\b(BRA|BSSY|CALL\S*)\b(.*?) 0x[0-9a-f]+$", r"\1\2", x) for x in instructions]


def compare_builds(
    before: Mapping[Key, list[str]], after: Mapping[Key, list[str]]
) -> dict[Key, str]:
    """The result of `compare` for the kernels of both builds, or which build lacks a kernel."""
    results = {}
    for key in sorted({*before, *after}):
        if key not in after:
            results[key] = "missing after"
        elif key not in before:
            results[key] = "missing before"
        else:
            results[key] = compare(before[key], after[key])
    return results


def renamed(
    kernels: Mapping[Key, list[str]], renames: Iterable[tuple[str, str]]
) -> dict[Key, list[str]]:
    """The kernels whose names begin with an old name under the new one; the first rename wins."""
    renames = list(renames)

    def new_name(name: str) -> str:
        for old, new in renames:
            if name == old or name.startswith(f"{old}_"):
                return new + name.removeprefix(old)
        return name

    return {(new_name(name), arch): x for (name, arch), x in kernels.items()}


def summary(results: Mapping[Key, str]) -> str:
    """One line an architecture: how many kernels are identical, renumbered, different."""
    lines = []
    for arch in sorted({arch for _, arch in results}):
        count = Counter(result for (_, a), result in results.items() if a == arch)
        equal = [count.pop(IDENTICAL, 0), count.pop(RENUMBERED, 0)]
        lines.append(
            f"{arch}: {equal[0]} {IDENTICAL}, {equal[1]} {RENUMBERED}, "
            f"{count.total()} different or missing"
        )
    return "\n".join(lines)


def main() -> None:
    """Read, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--kernels", default="*", help="only those whose new names fit")
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        type=lambda text: tuple(text.split("=", 1)),
        help="kernels called OLD or OLD_... before are called NEW or NEW_... after",
    )
    options = parser.parse_args()

    before = renamed(read_build(options.before), options.rename)
    before = {key: x for key, x in before.items() if fnmatchcase(key[0], options.kernels)}
    results = compare_builds(before, read_build(options.after, options.kernels))
    for (name, arch), result in results.items():
        if result not in (IDENTICAL, RENUMBERED):
            print(f"{name} {arch}: {result}")
    print(summary(results))
    sys.exit(int(any(result not in (IDENTICAL, RENUMBERED) for result in results.values())))


if __name__ == "__main__":
    main()
