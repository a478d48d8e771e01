"""Make the runs of the comparison, several at a time, and keep their results in one file.

A run whose result is in the file is not repeated. An interrupted one is continued from its last
checkpoint: repeat the command. Weights are in the run folders, which a result no longer needs; a
run that takes the weights of another makes that one again if its folder is gone.

Beside each run folder are FOLDER.json, the settings that it is trained with, and FOLDER.log, the
output of its commands. A folder of other settings is deleted, and the run is trained again. The
settings are those of the plan (Run.key) and those of the runs whose weights it takes. The defaults
of a preset are not among them: after a change of those, delete the folders and the results.

The commit, the date and the versions of a result are those of its scoring.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from comparison.run import Run
from comparison.samples import keep_samples
from environment import environment

from rcm.presets.from_scratch import FROM_SCRATCH
from rcm.training.files import write_atomically
from rcm.training.run_folder import delete_run_folder

COLLAPSED = re.compile(r"iteration (\d+): the student collapsed")
DIVERGED = re.compile(r"error: iteration \d+: |the training diverged")
# Only the report at the end, of few samples: rcm.evaluate scores them all.
FEW_REPORTS = ("--report-every", "1000000", "--evaluation-samples", "200")
DIGITS = 5  # significant, of the scores that are kept


class Results:
    """The results by the name of a run, in a JSON file that is written after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.content: dict[str, Any] = {"runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text())

    def find(self, run: Run) -> dict[str, Any] | None:
        """The result of a run with these settings, or None."""
        result: dict[str, Any] | None = self.content["runs"].get(run.name)
        return result if result is not None and result["settings"] == run.key() else None

    def add(self, run: Run, result: dict[str, Any]) -> None:
        with self.lock:
            self.content["runs"][run.name] = {"settings": run.key(), **result}
            self.write()

    def write(self) -> None:
        """One line for each row of a result, sorted by name."""
        runs = dict(sorted(self.content["runs"].items()))
        text = json.dumps({**self.content, "runs": runs}, indent=1, ensure_ascii=False)
        rows = re.compile(r"\{\s+\"network\"[^{}]*\}")
        text = rows.sub(lambda match: " ".join(match[0].split()), text)
        write_atomically(self.path, (text + "\n").encode())


class Runner:
    """Makes runs below a folder, `jobs` at a time."""

    def __init__(self, folder: Path, results: Results, samples: Path, jobs: int) -> None:
        self.folder, self.results, self.samples = folder, results, samples
        self.pool = ThreadPoolExecutor(jobs)
        self.made: dict[str, Future[str | None]] = {}
        self.stopped = threading.Event()

    def make(self, runs: Iterable[Run]) -> None:
        """Make all runs that have no result yet.

        Raises:
            RuntimeError: a command failed for another reason than divergence.
            RunError, OptionError: a folder of other settings cannot be deleted.
            KeyboardInterrupt: a command was interrupted.
        """
        missing = [run for run in runs if self.results.find(run) is None]
        for run in missing:
            self._submit(run)
        try:
            for number, run in enumerate(missing, start=1):
                self.made[run.name].result()
                print(f"{number} of {len(missing)}: {run.name}", flush=True)
        except BaseException:
            self.stopped.set()
            self.pool.shutdown(cancel_futures=True)
            raise

    def _submit(self, run: Run) -> None:
        """Make a run after those that it needs; the pool is a queue, so none waits for a later."""
        for other in run.needs:
            self._submit(other)
        if run.name not in self.made:
            self.made[run.name] = self.pool.submit(self._make, run)

    def _make(self, run: Run) -> str | None:
        """Train a run and score it unless it is; return why it diverged, or None."""
        problem = self._train(run)
        if self.results.find(run) is None:
            self.results.add(run, self._result(run, problem))
        return problem

    def _train(self, run: Run) -> str | None:
        """Finish the training of a run; return why it diverged, or None."""
        folder = self._folder(run)
        if (folder / "report.json").exists():
            return None
        for other in run.needs:
            if problem := self.made[other.name].result():
                return f"{other.name}: {problem}"
        weights: list[str] = []
        if run.teacher is not None:
            weights += ["--teacher", str(self._path(run.teacher))]
        if run.start is not None:
            weights += ["--student.start", str(self._path(run.start))]
        code, output = self._command(
            run,
            *("rcm.train", run.preset, "--folder", str(folder), "--method", run.method),
            *("--seed", str(run.seed), "--on-collapse", "continue", *FEW_REPORTS),
            *weights,
            *run.options,
        )
        if code == 1 and DIVERGED.search(output):
            # What follows names a checkpoint by its path.
            return _last_line(output).rpartition("error: ")[2].partition(";")[0]
        if code:
            raise self._failure(run, output)
        return None

    def _path(self, run: Run) -> Path:
        return self.folder / run.name

    def _folder(self, run: Run) -> Path:
        """The folder to train a run in: new, or with what these settings have made so far."""
        folder, settings = self._path(run), self._beside(run, "json")
        key = run.training_key()
        if not folder.exists() or not settings.exists() or json.loads(settings.read_text()) != key:
            delete_run_folder(folder)
            self._beside(run, "log").unlink(missing_ok=True)
            settings.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(settings, json.dumps(key, indent=1).encode())
        return folder

    def _beside(self, run: Run, kind: str) -> Path:
        """A file beside the folder of a run, since rcm.train refuses files of others in it."""
        folder = self._path(run)
        return folder.with_name(f"{folder.name}.{kind}")

    def _result(self, run: Run, problem: str | None) -> dict[str, Any]:
        """The scores of a trained run."""
        if problem is not None:
            return {
                **environment(),
                "iterations": run.iterations,
                "diverged": problem,
                "rows": [],
            }
        folder = self._path(run)
        samples = FROM_SCRATCH[run.preset].evaluation_samples
        # Of the teacher the reference alone, unless the run asks for more rows.
        code, output = self._command(
            run,
            *("rcm.evaluate", str(folder), "--reference-folder", str(self.folder / "references")),
            *("--samples", str(samples), "--teacher-steps", "32", *run.evaluation),
        )
        if code:
            raise self._failure(run, output)
        evaluation = json.loads((folder / "evaluation.json").read_text())
        # An interrupted run may have collapsed before its last start.
        log = self._beside(run, "log").read_text(errors="replace")
        collapsed = COLLAPSED.search(log)
        keep_samples(run, folder / "evaluation.safetensors", self.samples)
        return {
            **environment(),
            "iterations": evaluation["iterations"],
            "collapsed": None if collapsed is None else int(collapsed[1]),
            "protocol": evaluation["protocol"],
            "rows": [_rounded(row) for row in evaluation["rows"]],
        }

    def _command(self, run: Run, module: str, *options: str) -> tuple[int, str]:
        """Exit code and output of python -m module, which is appended to the log of the run.

        Raises KeyboardInterrupt if it is interrupted.
        """
        if self.stopped.is_set():
            raise KeyboardInterrupt
        command = [sys.executable, "-m", module, *options]
        with open(self._beside(run, "log"), "a+b") as log:
            start = log.seek(0, os.SEEK_END)
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
            log.seek(start)
            output = log.read().decode(errors="replace")
        if code == 130:
            raise KeyboardInterrupt
        return code, output

    def _failure(self, run: Run, output: str) -> RuntimeError:
        return RuntimeError(f"{run.name}: {_last_line(output)} (see {self._beside(run, 'log')})")


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
        for name, value in row.items()
    }
