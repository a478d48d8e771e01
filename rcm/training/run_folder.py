"""A run's folder: its settings, metrics, weights and checkpoints. One run at a time writes it.

The main rank writes all files but the shards of checkpoints, which every rank writes.

config.json             the settings; once there is more than UNSTARTED, others are refused, except
                        those of ANY_RANKS, which are those of the last start
metrics.jsonl           one line per iteration and per evaluation. It contains no wall-clock times,
                        so that an interrupted and an uninterrupted run write the same bytes
data.json               facts of the data, such as the shape of a sample, without which rcm.sample
                        could not build the student
data/                   samples of a synthetic run
checkpoints/            see rcm/training/checkpoint.py
teacher.safetensors     written when the teacher is finished, or copied from another run
start.safetensors       the student's first weights, if it starts from another run's student
student.safetensors     the averaged student at the last report
grids/, grid.png        samples from fixed noise
report.md, report.json  the final table
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from rcm.data.dataset import DataFacts, require_same_facts
from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.layout import Layout, MeshConfig
from rcm.errors import OptionError, RunError
from rcm.training.checkpoint import Checkpoints
from rcm.training.config import FromScratchConfig, RunConfig
from rcm.training.files import save_weights, write_atomically
from rcm.training.manifest import Checkpoint
from rcm.training.trainer import Trainer

PHASES = ("teacher", "student")
TEACHER_WEIGHTS, START_WEIGHTS = "teacher.safetensors", "start.safetensors"
STUDENT_WEIGHTS = "student.safetensors"
GRIDS = "grids"
# Settings that a run may change when it continues: on how many ranks, and how they share the work.
ANY_RANKS = {"accumulation", "keep_checkpoints", *(f"mesh.{f.name}" for f in fields(MeshConfig))}
SYNTHETIC_DATA = "data"  # the folder of a synthetic run's samples
DATA_FACTS = "data.json"
UNSTARTED = {
    "lock",
    "config.json",
    "metrics.jsonl",
    DATA_FACTS,
}  # the files before the first checkpoint


class RunFolder:
    """An open run folder; use `open_run_folder`."""

    def __init__(self, path: Path, layout: Layout, keep: int, metrics: BinaryIO | None) -> None:
        """metrics: the open metrics.jsonl on the main rank, None on the others."""
        self.path, self.layout = path, layout
        self.checkpoints = Checkpoints(path / "checkpoints", PHASES, group=layout.group, keep=keep)
        self.grids = path / GRIDS
        self.teacher_weights = path / TEACHER_WEIGHTS
        self.start_weights = path / START_WEIGHTS
        self.student_weights = path / STUDENT_WEIGHTS
        self._metrics = metrics

    def log(self, phase: str, iteration: int, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self._metrics is not None:
            line = json.dumps({"phase": phase, "iteration": iteration, **metrics})
            self._metrics.write(line.encode() + b"\n")
            self._metrics.flush()

    def metrics(self, phase: str) -> list[dict[str, Any]]:
        """The lines of a phase in metrics.jsonl so far."""
        lines = (self.path / "metrics.jsonl").read_bytes().splitlines()
        return [line for line in map(json.loads, lines) if line["phase"] == phase]

    def save_facts(self, facts: DataFacts) -> None:
        """Write data.json before the first checkpoint.

        Raises RunError if the run started with other data.
        """
        if (self.path / DATA_FACTS).exists() and not _is_unstarted(self.path):
            require_same_facts(
                read_facts(self.path),
                facts,
                origin="the run started with",
                remedy="restore them, or start another run",
            )
            return
        content = json.dumps(asdict(facts), indent=2)
        write_atomically(self.path / DATA_FACTS, content.encode())

    def save_weights(self, path: Path, weights: dict[str, Tensor]) -> None:
        """Write a safetensors file; afterwards every rank can read it."""
        with errors_on_every_rank():
            if self.layout.is_main:
                save_weights(path, weights)

    def save_checkpoint(
        self, phase: str, iteration: int, state: dict[str, Tensor], facts: dict[str, Any]
    ) -> None:
        """Start to save a state and facts, with the current length of metrics.jsonl."""
        with errors_on_every_rank():
            length = 0
            if self._metrics is not None:
                os.fsync(self._metrics.fileno())
                length = self._metrics.tell()
        self.checkpoints.save(phase, iteration, state, {**facts, "metrics_bytes": length})

    def last_checkpoint(self) -> Checkpoint | None:
        """The last intact checkpoint, or None; truncates metrics.jsonl to it.

        Prints a line for each newer, damaged checkpoint.
        """
        checkpoint, problems = self.checkpoints.latest()
        if self._metrics is not None:
            for problem in problems:
                print(f"{problem}; using the one before it")
            kept = 0 if checkpoint is None else checkpoint.facts["metrics_bytes"]
            length = self._metrics.seek(0, os.SEEK_END)
            if length < kept:  # truncate() would add zeros
                print(f"{self._metrics.name} has lost its last {kept - length} bytes")
            self._metrics.truncate(min(kept, length))
            self._metrics.seek(0, os.SEEK_END)
        return checkpoint

    def restore(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Give a trainer the state of a checkpoint."""
        state = trainer.state_dict()
        self.checkpoints.load(checkpoint, state)
        trainer.load_state_dict(state)

    def describe_last_checkpoint(self) -> str:
        """For error messages: where the last intact checkpoint is."""
        self.finish_saving()
        paths = self.checkpoints.intact_paths()
        if paths:
            return f"the last intact checkpoint is {paths[0]}"
        has_damaged = bool(self.checkpoints.damaged)
        return "there is no intact checkpoint" if has_damaged else "there is no checkpoint yet"

    def describe_good_checkpoint(self, phase: str, before: int) -> str:
        """For error messages: where the last checkpoint before an iteration of a phase is."""
        self.finish_saving()
        paths = self.checkpoints.intact_paths(before=(phase, before))
        return f"the last good checkpoint is {paths[0]}" if paths else "there is no good checkpoint"

    def finish_saving(self) -> None:
        """Wait for a save in flight, at the end of a run. Another error is on its way, if any."""
        with suppress(OSError, RunError, RuntimeError):
            self.checkpoints.finish()


@contextmanager
def open_run_folder(path: Path, config: RunConfig, layout: Layout) -> Iterator[RunFolder]:
    """Create the folder, or open one that was created with the same settings.

    All ranks must call it.

    A folder with only the files of UNSTARTED has nothing to continue. Its settings are replaced.

    Raises:
        OptionError: it cannot be written, or it holds other files.
        RunError: another process is using it, or its settings differ.
    """
    with ExitStack() as stack:
        metrics = None
        with errors_on_every_rank(), _explained(path):
            if layout.is_main:
                stack.enter_context(_locked(path))
                _require_same_settings(path, config)
                if isinstance(config, FromScratchConfig):
                    (path / GRIDS).mkdir(exist_ok=True)
                metrics = open(path / "metrics.jsonl", "ab")  # noqa: SIM115 (closed below)
                stack.callback(_close, metrics)
        with _explained(path):
            folder = RunFolder(path, layout, config.keep_checkpoints, metrics)
        stack.callback(folder.finish_saving)
        yield folder


def delete_run_folder(path: Path) -> None:
    """Delete a run folder, if it exists.

    Raises:
        OptionError: it holds other files, or cannot be deleted.
        RunError: another process is using it.
    """
    if not os.path.lexists(path):
        return
    with _explained(path), _locked(path):
        shutil.rmtree(path)


def _close(metrics: BinaryIO) -> None:
    with suppress(OSError):  # of a line that could not be written, which closing tries again
        metrics.close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"run folder {path} cannot be written ({error.strerror}); choose another with --folder"
        ) from error


def _locked(path: Path) -> BinaryIO:
    """Create the folder unless it exists; return its lock, which only one process can hold."""
    _require_no_other_files(path)
    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "wb")  # noqa: SIM115 (held while the folder is open)
    except OSError:
        for created in missing:
            with suppress(OSError):
                created.rmdir()
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise RunError(f"run folder {path} is in use by another process") from error
        raise
    return lock


def _require_no_other_files(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise OptionError(f"run folder {path} is not a folder; choose another with --folder")
    if path.exists() and not (path / "config.json").exists():
        others = sorted({p.name for p in path.iterdir()} - {"lock", "config.json.partial"})
        if others:
            raise OptionError(
                f"run folder {path} is neither empty nor a run folder (it contains {others[0]}); "
                "choose another with --folder"
            )


def read_settings(path: Path) -> dict[str, Any]:
    """The config.json of a run folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    try:
        settings = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise RunError(f"{path} is not a run folder: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path / 'config.json'} cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise RunError(f"{path / 'config.json'} holds no settings")
    return settings


def read_facts(path: Path) -> DataFacts:
    """The data.json of a run folder. Raises RunError if there is none, or it is damaged."""
    try:
        facts = json.loads((path / DATA_FACTS).read_bytes())
        shape, names = facts.pop("sample_shape"), facts.pop("class_names")
        return DataFacts(sample_shape=tuple(shape), class_names=tuple(names), **facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path / DATA_FACTS} cannot be read ({error})") from error


def _require_same_settings(path: Path, config: RunConfig) -> None:
    given = json.loads(json.dumps(asdict(config)))
    stored = read_settings(path) if (path / "config.json").exists() else None
    if stored is None or (stored.keys() == given.keys() and _is_unstarted(path)):
        write_atomically(path / "config.json", json.dumps(given, indent=2).encode())
        return
    there, now = flat_settings(stored), flat_settings(given)
    differences = [
        f"{name} = {there.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in {**there, **now}
        if there.get(name) != now.get(name) and name not in ANY_RANKS
    ]
    if differences:
        raise RunError(
            f"run folder {path} was created with other settings ({'; '.join(differences)}). "
            "Repeat its command to continue it, or choose another folder with --folder"
        )
    if given != stored:
        write_atomically(path / "config.json", json.dumps(given, indent=2).encode())


def _is_unstarted(path: Path) -> bool:
    """Whether the folder holds nothing but what a run writes before its first checkpoint."""
    made = [p.relative_to(path) for p in path.glob("**/*") if p.is_file()]
    whole = [p for p in made if not any(part.endswith(".partial") for part in p.parts)]
    return {p.name for p in whole if p.parts[0] != SYNTHETIC_DATA} <= UNSTARTED


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without groups: {"student.optimizer.lr": 1e-4, ...}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
