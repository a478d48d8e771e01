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
    """The commit of this repository, with "-dirty" if files other than results changed since.

    The page of the comparison, docs/methods.md, holds results.

    JVP_ATTN_COMMIT tells it where there is no repository.
    """
    if told := os.environ.get("JVP_ATTN_COMMIT"):
        return told
    root = str(Path(__file__).parents[1])
    describe = ["describe", "--always", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(["git", "-C", root, *describe], capture_output=True, text=True)
    if result.returncode:
        return "unknown"
    # Results are written while a benchmark runs.
    code = ["diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    code += [":(exclude)docs/methods.md"]
    changed = subprocess.run(["git", "-C", root, *code]).returncode
    return result.stdout.strip() + ("-dirty" if changed else "")
