"""Train a teacher and distil it into a few-step student.

    python -m rcm.train                         the preset `digits`, in runs/digits
    python -m rcm.train digits --run runs/a --config.seed 1
    python -m rcm.train --dry-run               build everything, run two steps of each phase

To continue a run that was interrupted, however it was, repeat its command.
"""

from __future__ import annotations

import difflib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from rcm.checkpoint import load_weights, save_weights
from rcm.config import PRESETS, RunConfig
from rcm.digits import CLASSES, load_digits
from rcm.errors import RunError
from rcm.evaluation import REFERENCE_STEPS, Evaluation, Scores
from rcm.report import save_grid, save_report, table
from rcm.run_folder import RunFolder, open_run_folder
from rcm.training import StudentPhase, TeacherPhase, build_network

TEACHER_STEPS = (1, 2, 8, 32)
STUDENT_STEPS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a command says: where to run, and every setting of the run."""

    run: Path
    """The run folder; made if it is not there, continued if it is."""
    dry_run: bool = False
    """Build everything and run two steps of each phase, in a folder that is then deleted."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code, 1 for anything that a user can mend."""
    try:
        arguments = parse(argv)
        if arguments.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder) / "dry-run", shortened(arguments.config))
            print("dry run: everything was built and works")
        else:
            run(arguments.run, arguments.config)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the command to continue", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> Arguments:
    """Read the preset (digits unless named) and the options that change it.

    Raises:
        RunError: an unknown preset or a setting out of range.
        SystemExit: help was asked for (0), or an option is wrong (1, after a message).
    """
    preset, options = "digits", argv
    if argv and not argv[0].startswith("-"):
        preset, *options = argv
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"; perhaps you meant {near[0]!r}" if near else ""
        raise RunError(f"unknown preset {preset!r}{hint}. Presets: {', '.join(PRESETS)}")
    default = Arguments(run=Path("runs") / preset, config=PRESETS[preset]())
    try:
        return tyro.cli(
            Arguments, prog=f"python -m rcm.train {preset}", args=options, default=default
        )
    except SystemExit as stop:
        sys.exit(1 if stop.code else 0)


def shortened(config: RunConfig) -> RunConfig:
    """The same run with two iterations in each phase."""
    return replace(
        config,
        teacher=replace(config.teacher, iterations=2),
        student=replace(config.student, iterations=2, tangent_warmup=1, critic_start=0),
        report_every=2,
        checkpoint_every=2,
    )


def run(path: Path, config: RunConfig) -> None:
    """Do what is left of a run: teacher, student, report.

    Raises:
        RunError: it cannot start or go on; the message says what to do.
    """
    with open_run_folder(path, config) as folder:
        try:
            _run_in(folder, config)
        except RunError as error:
            raise RunError(f"{error}; {folder.describe_last_checkpoint()}") from error
        except OSError as error:
            raise RunError(
                f"writing to {path} failed ({error.strerror or error}); make room or mend the "
                f"folder and repeat the command: {folder.describe_last_checkpoint()}"
            ) from error


def _run_in(folder: RunFolder, config: RunConfig) -> None:
    started = time.monotonic()
    digits = load_digits()
    evaluation = Evaluation(digits, config.student)
    restored = folder.last_checkpoint()
    for phase, state in restored.items():
        print(f"continuing {folder.path}: {phase}, iteration {state['iteration']}")

    teacher = build_network(config)
    if not folder.teacher_weights.exists():
        if "student" in restored:
            raise RunError(f"{folder.teacher_weights} is missing, which the student needs")
        teacher_phase = TeacherPhase(config, digits)
        if "teacher" in restored:
            teacher_phase.load_state_dict(restored["teacher"])
        _advance(teacher_phase, folder, config)
        save_weights(folder.teacher_weights, teacher_phase.weights())
    teacher.load_state_dict(load_weights(folder.teacher_weights))

    student_phase = StudentPhase(config, digits, teacher)
    if "student" in restored:
        student_phase.load_state_dict(restored["student"])
    endpoints = evaluation.teacher_samples(teacher, REFERENCE_STEPS)

    def evaluate() -> dict[str, Scores]:
        return _evaluate_student(student_phase, evaluation, endpoints, folder)

    _advance(student_phase, folder, config, evaluate)
    scores = {"real digits, half against half": evaluation.real_scores()}
    for steps in TEACHER_STEPS:
        reference = steps == REFERENCE_STEPS
        samples = endpoints if reference else evaluation.teacher_samples(teacher, steps)
        scores[_name("teacher", steps)] = evaluation.scores(samples, endpoints)
    scores |= evaluate()
    facts = {"preset": config.preset, "seed": config.seed, "torch": torch.__version__}
    save_report(folder.path, scores, facts)
    print(table(scores))
    print(f"{time.monotonic() - started:.0f} s; samples: {folder.path / 'grid.png'}")


def _advance(
    phase: TeacherPhase | StudentPhase,
    folder: RunFolder,
    config: RunConfig,
    evaluate: Callable[[], dict[str, Scores]] | None = None,
) -> None:
    """Step a phase to its end with metrics, checkpoints and, where there is one, evaluations."""
    progress = tqdm(
        desc=phase.name, total=phase.iterations, initial=phase.iteration, disable=None, leave=True
    )
    with progress:
        while phase.iteration < phase.iterations:
            metrics = phase.step()
            folder.log(phase.name, phase.iteration, metrics)
            progress.update()
            if "loss" in metrics:
                progress.set_postfix(loss=f"{metrics['loss']:.3g}")
            if evaluate is not None and phase.iteration % config.report_every == 0:
                for name, scores in evaluate().items():
                    folder.log(phase.name, phase.iteration, {"samples": name, **scores.as_dict()})
                    tqdm.write(f"{phase.iteration:5d}  {name:15s}  {scores}")
            done = phase.iteration == phase.iterations
            if done or phase.iteration % config.checkpoint_every == 0:
                folder.save_checkpoint(phase.name, phase.iteration, phase.state_dict())


def _evaluate_student(
    phase: StudentPhase, evaluation: Evaluation, endpoints: Tensor, folder: RunFolder
) -> dict[str, Scores]:
    """Score the averaged student, draw its grid and save its weights."""
    with phase.ema.applied_to(phase.student) as student:
        samples = {
            _name("student", steps): evaluation.student_samples(student, steps)
            for steps in STUDENT_STEPS
        }
    panels = {"data": evaluation.digits.images, _name("teacher", REFERENCE_STEPS): endpoints}
    panels |= dict(islice(samples.items(), 2))
    shown = {title: evaluation.shown(images) for title, images in panels.items()}
    for path in (folder.grids / f"{phase.iteration:07d}.png", folder.path / "grid.png"):
        save_grid(path, shown, rows=CLASSES)
    save_weights(folder.student_weights, phase.weights())
    return {name: evaluation.scores(images, endpoints) for name, images in samples.items()}


def _name(network: str, steps: int) -> str:
    return f"{network}, {steps} step{'s' if steps > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
