"""A run's folder: its settings, metrics, weights and checkpoints. One process at a time writes it.

config.json             the settings; once there is a checkpoint, others are refused
metrics.jsonl           one line per iteration and per evaluation. It contains no wall-clock times,
                        so that an interrupted and an uninterrupted run write the same bytes
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from rcm.errors import OptionError, RunError
from rcm.training.checkpoint import Checkpoints
from rcm.training.config import RunConfig
from rcm.training.files import write_atomically

PHASES = ("teacher", "student")
TEACHER_WEIGHTS, START_WEIGHTS = "teacher.safetensors", "start.safetensors"
STUDENT_WEIGHTS = "student.safetensors"
UNSTARTED = {"lock", "config.json", "metrics.jsonl"}  # the files before the first checkpoint


class RunFolder:
    """An open run folder; use `open_run_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", PHASES)
        self.grids = path / "grids"
        self.grids.mkdir(exist_ok=True)
        self.teacher_weights = path / TEACHER_WEIGHTS
        self.start_weights = path / START_WEIGHTS
        self.student_weights = path / STUDENT_WEIGHTS
        self._metrics = open(path / "metrics.jsonl", "ab")  # noqa: SIM115 (closed with the folder)

    def log(self, phase: str, iteration: int, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        line = json.dumps({"phase": phase, "iteration": iteration, **metrics})
        self._metrics.write(line.encode() + b"\n")
        self._metrics.flush()

    def metrics(self, phase: str) -> list[dict[str, Any]]:
        """The lines of a phase in metrics.jsonl so far."""
        lines = (self.path / "metrics.jsonl").read_bytes().splitlines()
        return [line for line in map(json.loads, lines) if line["phase"] == phase]

    def save_checkpoint(self, phase: str, iteration: int, state: dict[str, Any]) -> None:
        """Save a state and the current length of metrics.jsonl."""
        os.fsync(self._metrics.fileno())
        length = self._metrics.tell()
        self.checkpoints.save(phase, iteration, {"state": state, "metrics_bytes": length})

    def last_checkpoint(self) -> dict[str, dict[str, Any]]:
        """{phase: state} of the last intact checkpoint, or {}; truncates metrics.jsonl to it.

        Prints a line for each newer, damaged checkpoint.
        """
        checkpoint, problems = self.checkpoints.latest()
        for problem in problems:
            print(f"{problem}; using the one before it")
        self._metrics.truncate(0 if checkpoint is None else checkpoint["metrics_bytes"])
        self._metrics.seek(0, os.SEEK_END)
        return {} if checkpoint is None else {checkpoint["phase"]: checkpoint["state"]}

    def describe_last_checkpoint(self) -> str:
        """For error messages: where the last intact checkpoint is."""
        paths = self.checkpoints.paths()
        if not paths:
            return "there is no checkpoint yet"
        return f"the last intact checkpoint is {paths[0]}"

    def describe_good_checkpoint(self, phase: str, before: int) -> str:
        """For error messages: where the last checkpoint before an iteration of a phase is."""
        paths = self.checkpoints.paths(before=(phase, before))
        return f"the last good checkpoint is {paths[0]}" if paths else "there is no good checkpoint"

    def close(self) -> None:
        self._metrics.close()


@contextmanager
def open_run_folder(path: Path, config: RunConfig) -> Iterator[RunFolder]:
    """Create the folder, or open one that was created with the same settings.

    A folder without a checkpoint has nothing to continue. Its settings are replaced.

    Raises:
        OptionError: it cannot be written, or it holds other files.
        RunError: another process is using it, or its settings differ.
    """
    try:
        lock = _locked(path)
        try:
            _require_same_settings(path, config)
            folder = RunFolder(path)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        raise OptionError(
            f"run folder {path} cannot be written ({error.strerror}); choose another with --run"
        ) from error
    with lock:
        try:
            yield folder
        finally:
            folder.close()


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
        raise OptionError(f"run folder {path} is not a folder; choose another with --run")
    if path.exists() and not (path / "config.json").exists():
        others = sorted({p.name for p in path.iterdir()} - {"lock", "config.json.partial"})
        if others:
            raise OptionError(
                f"run folder {path} is neither empty nor a run folder (it contains {others[0]}); "
                "choose another with --run"
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


def _require_same_settings(path: Path, config: RunConfig) -> None:
    given = json.loads(json.dumps(asdict(config)))
    stored = read_settings(path) if (path / "config.json").exists() else None
    if stored is None or (stored.keys() == given.keys() and _is_unstarted(path)):
        write_atomically(path / "config.json", json.dumps(given, indent=2).encode())
        return
    there, now = _flatten(stored), _flatten(given)
    differences = [
        f"{name} = {there.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in {**there, **now}
        if there.get(name) != now.get(name)
    ]
    if differences:
        raise RunError(
            f"run folder {path} was created with other settings ({'; '.join(differences)}). "
            "Repeat its command to continue it, or choose another folder with --run"
        )


def _is_unstarted(path: Path) -> bool:
    """Whether the folder holds nothing but what a run writes before its first checkpoint."""
    made = [p for p in path.glob("**/*") if p.is_file() and p.suffix != ".partial"]
    return {p.name for p in made} <= UNSTARTED


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
