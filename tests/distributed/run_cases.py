"""Short runs of the tiny presets, built as rcm.run builds them: what each rank measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rcm.distributed.layout import Layout, MeshConfig
from rcm.distributed.tensors import full_tensor
from rcm.methods.rcm import RCM
from rcm.methods.tangents import Passes
from rcm.presets import PRESETS
from rcm.presets.tiny import tiny
from rcm.run_pretrained import pretrained_trainer
from rcm.training.config import PretrainedConfig
from rcm.training.optimization import Optimization
from rcm.training.run_folder import RunFolder, open_run_folder
from rcm.training.trainer import Trainer

Named = dict[str, Tensor]
# From this iteration on, the student has the DMD loss too, and every other one trains the critic.
DMD_START = 2
FIRST_UPDATES = {0: "student", DMD_START: "student with DMD", DMD_START + 1: "critic"}
# Iterations. At STOP every loss has been used once.
STOP, END, LONG_END = 4, 6, 20

SHARD, ULYSSES, RING = MeshConfig(shard=2), MeshConfig(ulysses=2), MeshConfig(ring=2)
RING_ULYSSES, SHARD_ULYSSES = MeshConfig(ring=2, ulysses=2), MeshConfig(shard=2, ulysses=2)
COPIES, SHARD_4 = MeshConfig(replicate=2, shard=2), MeshConfig(shard=4)


@dataclass(frozen=True)
class Case:
    """A run, and how the ranks share its work."""

    preset: str
    mesh: MeshConfig = field(default_factory=MeshConfig)
    accumulation: int = 1
    passes: Passes = "one"
    heads: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def name(self) -> str:
        sizes = {
            "replicate": self.mesh.replicate,
            "shard": self.mesh.shard or 1,
            "ring": self.mesh.ring,
            "ulysses": self.mesh.ulysses,
            "accumulation": self.accumulation,
        }
        layout = "-".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
        heads = f"-heads{self.heads}" if self.heads != 4 else ""
        dtype = "-bf16" if self.dtype == "bfloat16" else ""
        passes = "-two-passes" if self.passes == "two" else ""
        return f"{self.preset}{heads}{dtype}-{layout or 'alone'}{passes}"

    @property
    def alone(self) -> Case:
        """The same run in one process, in one pass."""
        return replace(self, mesh=MeshConfig(), accumulation=1, passes="one")

    @property
    def config(self) -> PretrainedConfig:
        config = PRESETS[self.preset].config("rcm")
        assert isinstance(config, PretrainedConfig)
        assert isinstance(config.student, RCM)
        model = tiny(config.model.architecture, heads=self.heads)
        return replace(
            config,
            model=replace(model, dtype=self.dtype),
            student=replace(config.student, tangent_warmup=DMD_START, passes=self.passes),
            mesh=self.mesh,
            accumulation=self.accumulation,
        )


@contextmanager
def opened(case: Case, path: Path) -> Iterator[tuple[RunFolder, Trainer]]:
    """A run at the last checkpoint of its folder, or at the start."""
    with open_run_folder(path, case.config, Layout(case.mesh)) as folder:
        yield folder, pretrained_trainer(folder, case.config, torch.device("cpu"))


def measured(cases: Sequence[Case], iterations: int, path: Path) -> dict[str, Any]:
    """The first iterations of each case, by its name; each in a folder of its own."""
    found = {}
    for case in cases:
        with opened(case, path / case.name) as (_, trainer):
            found[case.name] = trained(trainer, iterations)
    return found


def trained(trainer: Trainer, end: int) -> dict[str, Any]:
    """Train until an iteration.

    Returns the metrics of each iteration, the clipped gradients of FIRST_UPDATES by parameter, and
    the averaged weights at the end.
    """
    gradients: dict[str, Named] = {}
    for optimization in trainer.optimizations.values():

        def keep(*_: Any, optimization: Optimization = optimization) -> None:
            if trainer.iteration in FIRST_UPDATES:
                parameters = zip(optimization.names, optimization.parameters, strict=True)
                gradients[FIRST_UPDATES[trainer.iteration]] = {
                    name: full_tensor(parameter.grad).clone()
                    for name, parameter in parameters
                    if parameter.grad is not None
                }

        optimization.optimizer.register_step_pre_hook(keep)
    metrics = [trainer.step() for _ in range(trainer.iteration, end)]
    return {"metrics": metrics, "gradients": gradients, "weights": trainer.weights()}


def stopped(case: Case, path: Path) -> dict[str, Any]:
    """A run until STOP, with a checkpoint there."""
    with opened(case, path / "stopped" / case.name) as (folder, trainer):
        found = trained(trainer, STOP)
        folder.save_checkpoint(trainer.name, trainer.iteration, trainer.state_dict(), {})
        folder.checkpoints.finish()
    return found


def continued(before: Case, case: Case, path: Path) -> dict[str, Any]:
    """A stopped run from STOP to END, as another case. Its folder stays as it is."""
    with opened(case, path / "stopped" / before.name) as (_, trainer):
        assert trainer.iteration == STOP
        return trained(trainer, END)


# ---- what the ranks do -------------------------------------------------------------------------

WAN_SHARD, WAN_ULYSSES = Case("wan-tiny", SHARD), Case("wan-tiny", ULYSSES)
WAN_ALONE = WAN_SHARD.alone
# A text of 7 tokens, a video of 45 and an image of 15; 4 and 3 heads: 2 does not divide them all.
TWO_RANKS = [
    WAN_SHARD,
    WAN_ULYSSES,
    Case("cosmos-tiny", RING, passes="two"),
    Case("sd3-tiny", ULYSSES, heads=3),
    Case("wan-tiny", SHARD, accumulation=2),
]
BFLOAT16 = [replace(case, dtype="bfloat16") for case in (WAN_SHARD, WAN_ULYSSES)]
BFLOAT16_END = DMD_START + 2


def on_two_ranks(path: Path, rank: int) -> dict[str, Any]:
    """What test_runs compares with one process, which has stopped at a checkpoint already."""
    return {
        **measured(TWO_RANKS, END, path / "two ranks"),
        **measured(BFLOAT16, BFLOAT16_END, path / "two ranks"),
        "shard, stopped": stopped(WAN_SHARD, path),
        "shard -> shard": continued(WAN_SHARD, WAN_SHARD, path),
        "alone -> ulysses": continued(WAN_ALONE, WAN_ULYSSES, path),
        "shard -> ulysses": continued(WAN_SHARD, WAN_ULYSSES, path),
    }


def on_one_rank_before(path: Path) -> dict[str, Any]:
    return {
        **measured(alone(TWO_RANKS), END, path / "alone"),
        **measured(alone(BFLOAT16), BFLOAT16_END, path / "alone"),
        "alone, stopped": stopped(WAN_ALONE, path),
    }


def on_one_rank_afterwards(path: Path) -> dict[str, Any]:
    return {
        "alone -> alone": continued(WAN_ALONE, WAN_ALONE, path),
        "shard -> alone": continued(WAN_SHARD, WAN_ALONE, path),
    }


def alone(cases: Sequence[Case]) -> list[Case]:
    """The runs of one process that these are compared with."""
    return list(dict.fromkeys(case.alone for case in cases))


# ---- presets × layouts × passes ----------------------------------------------------------------

NAMES = ("wan-tiny", "cosmos-tiny", "sd3-tiny")

# On two ranks all presets run on all layouts in one pass; in two passes Wan does, and the others on
# one layout each. On four ranks all run on RING_ULYSSES, and Wan on every layout.
LONG_ON_TWO = [WAN_SHARD, Case("cosmos-tiny", ULYSSES), Case("sd3-tiny", RING)]
PRODUCT_ON_TWO = [
    case
    for case in (
        *(Case(name, mesh) for name in NAMES for mesh in (SHARD, ULYSSES, RING)),
        *(Case(name, SHARD, accumulation=2) for name in NAMES),
        *(Case("wan-tiny", mesh, passes="two") for mesh in (SHARD, ULYSSES, RING)),
        Case("wan-tiny", SHARD, accumulation=2, passes="two"),
        Case("cosmos-tiny", ULYSSES, passes="two"),
        Case("sd3-tiny", RING, passes="two"),
    )
    if case not in TWO_RANKS + LONG_ON_TWO
]
WAN_SHARD_4 = Case("wan-tiny", SHARD_4)
PRODUCT_ON_FOUR = [
    *(Case(name, RING_ULYSSES) for name in NAMES),
    *(Case("wan-tiny", mesh) for mesh in (SHARD_ULYSSES, COPIES)),
    Case("wan-tiny", SHARD_ULYSSES, passes="two"),
    WAN_SHARD_4,
]


def product_on_one_rank(path: Path) -> dict[str, Any]:
    return measured(alone(PRODUCT_ON_TWO + PRODUCT_ON_FOUR), END, path)


def long_runs(cases: Sequence[Case], path: Path) -> dict[str, Any]:
    return measured(cases, LONG_END, path / "long")


def product_on_two_ranks(path: Path, rank: int) -> dict[str, Any]:
    return {**measured(PRODUCT_ON_TWO, END, path), **long_runs(LONG_ON_TWO, path)}


def product_on_four_ranks(path: Path, rank: int) -> dict[str, Any]:
    repeated = measured([WAN_SHARD_4], END, path / "repeated")
    return {**measured(PRODUCT_ON_FOUR, END, path), "repeated": repeated[WAN_SHARD_4.name]}
