"""Stage compare: the kernels as they are against kernels that are built with other macros.

A comparison is a macro and its other value, such as "JVP_ATTN_TURNS=0". The bfloat16 kernels of the
operations are compiled with it into an extension of their own. Both extensions are timed in turn,
in one process, and their results must agree.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from contenders import OPERATIONS, Attention, ours

import jvp_attn
from benchmarks.first_contact.build import ROOT, run_setup
from benchmarks.first_contact.case import Case, LeftOut, Result, Wrong
from benchmarks.first_contact.settings import Settings
from benchmarks.first_contact.speed import problem_of, timed
from benchmarks.first_contact.target import HOPPER, Target, target_of
from jvp_attn.backends import select
from jvp_attn.backends.cuda import CudaBackend, MetaCudaBackend
from jvp_attn.backends.kernel_table import KERNELS, kernel_name
from tests.emulator import emulator, emulator_build

# The steps of an operation, whose kernels it launches.
STEPS = {
    "forward": ("forward",),
    "forward+tangent": ("forward_jvp",),
    "backward": ("forward", "preprocess", "backward_dq", "backward_dkv"),
    "backward of both": ("forward_jvp", "preprocess", "jvp_backward_dq", "jvp_backward_dkv"),
}


@dataclass(frozen=True)
class Comparison:
    """What a macro affects."""

    operations: tuple[str, ...] = tuple(OPERATIONS)
    head_dims: tuple[int, ...] = (64, 128)

    @property
    def kernels(self) -> list[str]:
        """The bfloat16 kernels that the operations launch on a Hopper GPU."""
        steps = {step for operation in self.operations for step in STEPS[operation]}
        names = {
            own
            if (own := kernel_name(step, "bf16", head_dim, arch="sm90")) in KERNELS
            else kernel_name(step, "bf16")
            for step in steps
            for head_dim in self.head_dims
        }
        return sorted(names)


COMPARISONS = {
    # Warpgroups take turns at the tensor cores; at head dim 256 they do not.
    "JVP_ATTN_TURNS=0": Comparison(("forward", "forward+tangent", "backward")),
    "JVP_ATTN_TURNS=1": Comparison(("forward",), (256,)),
    # The wait for a product comes after the exponentials of the one before.
    "JVP_ATTN_WAITS_BEHIND_EXPONENTIALS=0": Comparison(("forward",), (64, 128, 256)),
}
SIZE = 8192
AGAIN = "jvp_attn, again"


def cases(settings: Settings) -> Iterator[Case]:
    """For each comparison the build, then every operation and head dim."""
    target = target_of(settings)
    macros = settings.comparisons or tuple(COMPARISONS)
    pool = ThreadPoolExecutor(len(macros) if target.is_gpu else 1)
    builds = {macro: pool.submit(variant, target, macro) for macro in macros}
    for macro, build in builds.items():
        yield Case(f"{macro}, build", partial(_kernels_of, build))
        comparison = COMPARISONS.get(macro, Comparison())
        for operation, head_dim in product(comparison.operations, comparison.head_dims):
            run = partial(compare, target, macro, build, operation, head_dim)
            yield Case(f"{macro}, {operation}, d{head_dim}", run, {"seed": 0})


def compare(
    target: Target, macro: str, build: Future[ModuleType], operation: str, head_dim: int
) -> Result:
    """Time both builds; their results agree.

    The first is timed twice: a smaller difference than between its times is noise.
    """
    if build.exception() is not None:
        raise LeftOut("its build failed")
    as_built, other = _as_built(target), _attention(target, macro, build.result())
    problem = problem_of(target, operation, head_dim, SIZE)
    primals = problem.inputs(target.device).primals
    with torch.no_grad():
        a, b = (attention(*primals, False).double() for attention in (as_built, other))
    contenders = {"jvp_attn": as_built, macro: other, AGAIN: as_built}
    row = timed(target, problem, {name: (x, (operation,)) for name, x in contenders.items()})
    if macro in row["missing"] or not (a - b).norm() <= 0.01 * a.norm():
        raise Wrong(row["missing"].get(macro, "the results differ"), row)
    return row


# ----------------------------------------------------------------------------
# The other build


def variant(target: Target, macro: str) -> ModuleType:
    """The extension module with the macro.

    Raises:
        ValueError: no kernel reads it.
    """
    name = macro.partition("=")[0]
    if not any(re.search(rf"\b{name}\b", x.read_text()) for x in (ROOT / "csrc").rglob("*.*")):
        raise ValueError(f"no file in csrc/ reads the macro {name}")
    kernels = COMPARISONS.get(macro, Comparison()).kernels
    folder = re.sub(r"\W", "_", macro)
    if not target.is_gpu:
        flags = emulator_build.Variant(folder, (f"-D{macro}",))
        return emulator.import_file(emulator_build.build_kernels(flags, kernels.__contains__))
    return emulator.import_file(build(ROOT / "build" / "variants" / folder, macro, kernels))


def build(folder: Path, macro: str, kernels: list[str]) -> Path:
    """Build an extension of these kernels in a copy of the sources."""
    for part in ("csrc", "jvp_attn"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / part, folder / part, ignore=ignore, dirs_exist_ok=True)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / file, folder)
    with (folder / "jvp_attn" / "backends" / "kernel_table.py").open("a") as table:
        table.write(f"KERNELS = {{name: KERNELS[name] for name in {kernels}}}\n")
    flags = {"JVP_ATTN_CPU": "0", "JVP_ATTN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    flags["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -D{macro}".strip()
    run_setup("build_ext", "--inplace", folder=folder, **flags)
    [module] = (folder / "jvp_attn").glob("_C.*.so")
    return module


def _kernels_of(build: Future[ModuleType]) -> Result:
    module = build.result()
    return {"file": module.__file__, "kernels": sorted(module.kernels())}


# ----------------------------------------------------------------------------
# Attention with either build


def _as_built(target: Target) -> Attention:
    return ours if target.is_gpu else _attention(target, "as built", target.extension())


def _attention(target: Target, name: str, extension: ModuleType) -> Attention:
    """Attention by the kernels of an extension module, as a backend of this process."""

    def stream_of(device: torch.device) -> nullcontext[int]:
        return nullcontext(torch.cuda.current_stream().cuda_stream if target.is_gpu else 0)

    backend = CudaBackend(extension, stream_of, lambda device: HOPPER)
    select._BACKENDS[name] = select._Backend(lambda: backend, MetaCudaBackend())

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        with jvp_attn.backend(name):
            return jvp_attn.flash_attn_jvp(q, k, v, causal=causal)

    return attention
