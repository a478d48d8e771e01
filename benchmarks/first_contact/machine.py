"""Stage machine: the device, the versions, the commit, and what a build needs besides nvcc.

Every run has this stage: each of its results belongs to a machine.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.first_contact.build import run_setup
from benchmarks.first_contact.case import Case, Result
from benchmarks.first_contact.settings import Settings

PEERS = ("flash_attn", "jvp_flash_attention", "triton")


def cases(settings: Settings) -> Iterator[Case]:
    """Headers, metadata, then the facts, which are read from the metadata too."""
    yield Case("headers", headers)
    yield Case("metadata", partial(run_setup, "egg_info"))
    yield Case("facts", partial(facts, settings))


def headers() -> Result:
    """Python.h, which pybind11 includes."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise FileNotFoundError(
            f"there is no {header}: install Python's headers (python3-dev), or set PYTHON to an "
            "interpreter that has them"
        )
    return None


def facts(settings: Settings) -> Result:
    """Device, versions and commit."""
    import torch
    from environment import environment

    found: dict[str, Any] = {**environment(), "cuda": torch.version.cuda, "cores": os.cpu_count()}
    found["peers"] = [name for name in PEERS if importlib.util.find_spec(name)]
    found["definitions"] = settings.definitions
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = torch.cuda.get_device_capability()
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["nvidia_smi"] = nvidia_smi("driver_version,clocks.sm,clocks.max.sm")
    return found


def nvidia_smi(query: str) -> str:
    """What nvidia-smi says; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
