"""`python -m rcm.train` with a smaller wan-tiny.

torchrun --nproc-per-node 2 -m tests.distributed.training_program wan-tiny OPTIONS
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

from diffusers import WanTransformer3DModel  # noqa: F401 (a fork server imports it before forks)

from rcm import train
from rcm.distributed import processes
from rcm.distributed.heartbeat import HeartbeatConfig
from rcm.presets import PRESETS, Preset
from rcm.presets.pretrained import PRETRAINED
from rcm.presets.tiny import tiny

NAME = "wan-tiny"
SMALLER = replace(PRETRAINED[NAME], model=tiny("wan", layers=1))


def main(arguments: list[str], heartbeat: HeartbeatConfig | None = None) -> int:
    PRESETS[NAME] = Preset(partial(SMALLER.config, NAME), SMALLER.methods, "rcm")
    if heartbeat is not None:
        processes.HeartbeatConfig = lambda: heartbeat  # type: ignore[assignment, misc]
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
