"""Device, versions and commit of a measurement; every result file holds them."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import jvp_attn


def environment() -> dict[str, Any]:
    """Device, threads, versions, commit and date."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jvp_attn": jvp_attn.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    """The commit of this folder, with "-dirty" if files have changed since.

    JVP_ATTN_COMMIT tells it where there is no repository.
    """
    if told := os.environ.get("JVP_ATTN_COMMIT"):
        return told
    folder = str(Path(__file__).parent)
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(["git", "-C", folder, *describe], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"
