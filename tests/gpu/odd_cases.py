"""Cases that pass, fail, crash, hang, … for the tests of benchmarks/first_contact."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.first_contact.case import Case, LeftOut, Result, Wrong
from benchmarks.first_contact.settings import Settings


def cases(settings: Settings) -> Iterator[Case]:
    """Each appends its name to the file `ran` in the folder of results."""
    if "no cases" in settings.cases:
        raise RuntimeError("torch finds no NVIDIA GPU")
    for name, run in {
        "passes": lambda: {"answer": 42},
        "fails": partial(fail, AssertionError("3 of 64 numbers differ")),
        "fails with a result": partial(fail, Wrong("too slow", {"tflops": 1})),
        "is left out": partial(fail, LeftOut("the GPU's compute capability is not 9.0")),
        "crashes": partial(os.kill, os.getpid(), signal.SIGSEGV),
        "exits": partial(os._exit, 3),
        "hangs": partial(time.sleep, 1e6),
        "loses the device": lose_device,
        "crashes at exit": partial(at_exit, os.kill, os.getpid(), signal.SIGSEGV),
        "hangs at exit": partial(at_exit, time.sleep, 1e6),
        "passes at last": lambda: None,
    }.items():
        yield Case(name, partial(noted, settings, name, run), {"seed": 7}, group=group_of(name))
    yield Case("is of the group of a crash", lambda: None, group=group_of("crashes"))


def noted(settings: Settings, name: str, run: partial[Result]) -> Result:
    with Path(settings.out, "ran").open("a") as file:
        file.write(name + "\n")
    return run()


def group_of(name: str) -> str | None:
    return "crashing kernels" if name == "crashes" else None


def fail(error: Exception) -> None:
    raise error


def at_exit(*call: Any) -> None:
    atexit.register(*call)


def lose_device() -> None:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nMore lines")

    gpu = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = SimpleNamespace(cuda=gpu)  # type: ignore[assignment]
