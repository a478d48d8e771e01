"""Stage build: the extension for this GPU alone, and the probes of the conformance stage.

Nothing is installed: the extension is built in place, against the packages that are there. A
rehearsal builds the CPU kernels and the emulator instead.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.first_contact.case import Case, Result
from benchmarks.first_contact.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PROBES = ROOT / "build" / "conformance"
PROBE_SOURCES = {"conformance_sm90.cu": "sm_90a", "conformance.cu": "sm_80"}


def cases(settings: Settings) -> Iterator[Case]:
    """Extension and probes."""
    os.environ["NVCC_APPEND_FLAGS"] = " ".join(
        [os.environ.get("NVCC_APPEND_FLAGS", ""), *(f"-D{x}" for x in settings.definitions)]
    ).strip()
    probes = _Probes(settings.rehearse)
    yield Case("extension", partial(extension, settings, probes))
    yield Case("probes", probes.result)


def run_setup(*arguments: str, folder: Path = ROOT, **environment: str) -> Result:
    """Run the setup.py of a folder with the packages that are installed."""
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(result.stdout)
    if result.returncode:
        raise RuntimeError("\n".join(result.stdout.splitlines()[-30:]))
    return None


def extension(settings: Settings, probes: _Probes) -> Result:
    """Build it, while the probes compile beside it, and import it."""
    probes.start()
    if settings.rehearse:
        run_setup("build_ext", "--inplace", JVP_ATTN_CPU="1", JVP_ATTN_CUDA="0")
        from tests.emulator import emulator

        return {"kernels": len(emulator.load().kernels())}
    from benchmarks.first_contact.target import target_of

    arch = "{}.{}".format(*target_of(settings).capability)
    flags = {"JVP_ATTN_CPU": "0", "JVP_ATTN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    run_setup("build_ext", "--inplace", **flags)
    importlib.invalidate_caches()
    from jvp_attn import _C

    return {"kernels": len(_C.kernels()), "build": dict(_C.build_info())}


class _Probes:
    """Modules of the kernels with one instruction each."""

    def __init__(self, rehearse: bool) -> None:
        self._build = _build_for_emulator if rehearse else _build_for_gpu
        self._files: list[Future[Path]] = []

    def start(self) -> None:
        if not self._files:
            pool = ThreadPoolExecutor(1)  # the extension needs the other cores
            self._files = [pool.submit(self._build, source) for source in PROBE_SOURCES]

    def result(self) -> Result:
        self.start()
        return {"files": [str(file.result()) for file in self._files]}


def _build_for_gpu(source: str) -> Path:
    import torch

    from tests.gpu.conformance import build_for_gpu

    capability = torch.cuda.get_device_capability()
    if PROBE_SOURCES[source] == "sm_90a" and capability != (9, 0):
        return Path()
    arch = "sm_90a" if capability == (9, 0) else "sm_{}{}".format(*capability)
    PROBES.mkdir(parents=True, exist_ok=True)
    return build_for_gpu(PROBES, source, arch)


def _build_for_emulator(source: str) -> Path:
    from tests.emulator import emulator_build

    name = f"{Path(source).stem}_emulator"
    return emulator_build.build_module(name, [ROOT / "tests" / "gpu" / source])
