"""Train a teacher and distil it into a few-step student.

    python -m rcm.train                              the preset `digits`, in runs/digits
    python -m rcm.train digits --run runs/a --seed 1
    python -m rcm.train digits --method meanflow     another method, in runs/digits-meanflow
    python -m rcm.train digits --method scm --teacher runs/digits    with the teacher of that run
    python -m rcm.train --dry-run                    build everything, run a few steps

Repeat the command to continue an interrupted run.
"""

from __future__ import annotations

import difflib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from rcm import command_line
from rcm.data.dataset import Dataset
from rcm.errors import OptionError, RunError
from rcm.evaluation.evaluator import REFERENCE_STEPS, Evaluator, Scores
from rcm.evaluation.probes import Probes
from rcm.evaluation.report import save_grid, save_report, table
from rcm.presets import DEFAULT_PRESET, PRESETS, config_from_settings
from rcm.training.checkpoint import load_weights, save_weights, write_atomically
from rcm.training.collapse import CollapseError, CollapseWatch, OnCollapse
from rcm.training.config import RunConfig
from rcm.training.loop import train
from rcm.training.method import SCRATCH, TEACHER, Method
from rcm.training.resources import require_device, require_memory
from rcm.training.reuse import weights_of_other_runs, with_teacher_settings
from rcm.training.run_folder import RunFolder, open_run_folder
from rcm.training.trainer import Trainer, Weights, build_networks, load_into

TEACHER_STEPS = (1, 2, 8, 32)
STUDENT_STEPS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a teacher and distil it into a few-step student."""

    run: Path
    """The run folder. It is created, or continued if it exists."""
    dry_run: bool = False
    """Build everything and run a few steps of each phase in a temporary folder."""
    method: str
    """The distillation method."""
    on_collapse: OnCollapse = "stop"
    """Stop a run whose student collapses, or explain it and continue."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code.

    It is 2 after an invalid option, 1 if the run cannot start or continue, 130 after an interrupt.
    """
    try:
        arguments = parse(argv)
        config = with_teacher_settings(
            arguments.config,
            arguments.run,
            default=PRESETS[arguments.config.preset].config(arguments.method),
            read_config=config_from_settings,
        )
        if arguments.dry_run:
            with _temporary_folder() as folder:
                run(folder / "dry-run", config.shortened(), arguments.on_collapse)
            print("dry run: everything was built and works")
        else:
            run(arguments.run, config, arguments.on_collapse)
    except (OptionError, RunError) as error:
        return command_line.report(error)
    except KeyboardInterrupt as interrupt:
        where = "".join(f"; {note}" for note in getattr(interrupt, "__notes__", ()))
        print(f"\ninterrupted{where}; repeat the command to continue", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> Arguments:
    """Read the preset and the method (by default those of PRESETS) and the options that change it.

    Raises:
        OptionError: the preset, the method or an option is unknown, or a value is not allowed.
        SystemExit: help was requested.
    """
    name, options = DEFAULT_PRESET, argv
    if argv and not argv[0].startswith("-"):
        name, *options = argv
    preset = PRESETS[_known("preset", name, PRESETS)]
    method = _known("method", _method_in(options) or preset.default_method, preset.methods)
    folder = name if method == preset.default_method else f"{name}-{method}"
    default = Arguments(run=Path("runs") / folder, method=method, config=preset.config(method))
    prog = f"python -m rcm.train {name}"
    return command_line.parse(Arguments, prog=prog, args=options, default=default)


def _method_in(options: list[str]) -> str | None:
    """The value of --method, which decides what the other options are."""
    for option, value in pairwise([*options, ""]):
        if option == "--method":
            return value
        if option.startswith("--method="):
            return option.removeprefix("--method=")
    return None


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; perhaps you meant {near[0]!r}" if near else ""
    raise OptionError(f"unknown {kind} {name!r}{hint}. {kind.capitalize()}s: {', '.join(known)}")


def run(path: Path, config: RunConfig, on_collapse: OnCollapse = "stop") -> None:
    """Do what is left of a run: teacher, student, report.

    Raises:
        OptionError: the machine lacks the device or the memory, or the folder cannot be used.
        RunError: it cannot start or continue, or the student collapsed; the message says what to
            do.
    """
    require_device(config)
    require_memory(config)
    torch.set_num_threads(config.threads)
    borrowed = weights_of_other_runs(
        config, path, build=lambda: build_network(config), read_config=config_from_settings
    )
    with open_run_folder(path, config) as folder:
        try:
            for name, content in borrowed.items():
                write_atomically(path / name, content)
            _run_in(folder, config, on_collapse)
        except CollapseError:
            raise
        except RunError as error:
            raise RunError(f"{error}; {folder.describe_last_checkpoint()}") from error
        except OSError as error:
            raise RunError(
                f"writing to {path} failed ({error.strerror or error}). Free some space or repair "
                f"the folder and repeat the command; {folder.describe_last_checkpoint()}"
            ) from error
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(folder.describe_last_checkpoint())
            raise


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise OptionError(f"--dry-run finds no temporary folder ({error}); set TMPDIR") from error
    with folder as path:
        yield Path(path)


def _load_data(config: RunConfig) -> Dataset:
    data = config.data.load()
    bad = int((~data.samples.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise RunError(
            f"{bad} of the {len(data.labels)} samples of {config.data.name} contain NaN or infinity"
        )
    return data.to(torch.device(config.device))


def build_network(config: RunConfig) -> nn.Module:
    """The network of every role, with weights drawn from the run's seed."""
    # Drawn on the CPU, so that every device starts from the same weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = config.model.build(config.data.sample_shape, config.data.classes)
    return network.to(config.device)


def _run_in(folder: RunFolder, config: RunConfig, on_collapse: OnCollapse) -> None:
    started = time.monotonic()
    data = _load_data(config)
    evaluator = Evaluator(data, config.data.classifier(data), config.student)
    restored = folder.last_checkpoint()
    for phase, state in restored.items():
        print(f"continuing {folder.path}: {phase}, iteration {state['iteration']}")

    def trainer(phase: str, method: Method, weights: dict[str, Weights], seed: int) -> Trainer:
        networks = build_networks(method.roles(), lambda: build_network(config), weights)
        built = Trainer(phase, method, networks, data, seed=seed)
        if phase in restored:
            built.load_state_dict(restored[phase])
        return built

    if not folder.teacher_weights.exists():
        if "student" in restored:
            raise RunError(f"{folder.teacher_weights} is missing, but the student needs it")
        training = trainer("teacher", config.teacher, {}, 2 * config.seed)
        train(training, folder, config)
        save_weights(folder.teacher_weights, training.weights())
    weights = {TEACHER: load_weights(folder.teacher_weights)}
    if config.student.start not in (TEACHER, SCRATCH):
        weights[config.student.start] = load_weights(folder.start_weights)
    distillation = trainer("student", config.student, weights, 2 * config.seed + 1)
    teacher = build_network(config)
    load_into(teacher, weights[TEACHER], str(folder.teacher_weights))
    teacher_samples = evaluator.teacher_samples(teacher, REFERENCE_STEPS)

    def report() -> None:
        scores = _evaluate_student(distillation, evaluator, teacher_samples, folder)
        for name, score in scores.items():
            metrics = {"samples": name, **score.as_dict()}
            folder.log(distillation.name, distillation.iteration, metrics)
            tqdm.write(f"{distillation.iteration:5d}  {name:15s}  {score}")

    probes = Probes(data, evaluator.classifier, config.student, teacher)
    watch = CollapseWatch(
        probes.measure, probes.teacher_rmse(), every=config.probe_every, on_collapse=on_collapse
    )
    if "student" in restored:
        watch.load_state_dict(restored["student"]["watch"])
    train(distillation, folder, config, report, watch)
    scores = {f"real {config.data.name}, half against half": evaluator.real_scores()}
    for steps in TEACHER_STEPS:
        reference = steps == REFERENCE_STEPS
        samples = teacher_samples if reference else evaluator.teacher_samples(teacher, steps)
        name = _name("teacher", steps)
        scores[name] = _score(evaluator, name, samples, teacher_samples)
    scores |= _evaluate_student(distillation, evaluator, teacher_samples, folder)
    facts = {"preset": config.preset, "seed": config.seed, "torch": torch.__version__}
    save_report(folder.path, scores, facts)
    print(table(scores))
    print(f"{time.monotonic() - started:.0f} s; samples: {folder.path / 'grid.png'}")


def _evaluate_student(
    trainer: Trainer, evaluator: Evaluator, teacher_samples: Tensor, folder: RunFolder
) -> dict[str, Scores]:
    """Score the averaged student, draw its grid and save its weights."""
    with trainer.averaged() as student:
        samples = {
            _name("student", steps): evaluator.student_samples(student, steps)
            for steps in STUDENT_STEPS
            if steps <= evaluator.config.max_steps
        }
    panels = {"data": evaluator.data.samples, _name("teacher", REFERENCE_STEPS): teacher_samples}
    panels |= dict(islice(samples.items(), 2))
    shown = {title: evaluator.first_of_each_class(images) for title, images in panels.items()}
    for path in (folder.grids / f"{trainer.iteration:07d}.png", folder.path / "grid.png"):
        save_grid(path, shown, rows=len(evaluator.data.labels.unique()))
    save_weights(folder.student_weights, trainer.weights())
    return {
        name: _score(evaluator, name, images, teacher_samples) for name, images in samples.items()
    }


def _score(evaluator: Evaluator, name: str, samples: Tensor, teacher_samples: Tensor) -> Scores:
    try:
        return evaluator.scores(samples, teacher_samples)
    except ValueError as error:
        raise RunError(
            f"samples of {name} cannot be scored ({error}): the training diverged"
        ) from error


def _name(network: str, steps: int) -> str:
    return f"{network}, {steps} step{'s' if steps > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
