"""A run: train a teacher, distil it, score both, all in a folder that can be continued."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rcm.errors import RunError
from rcm.evaluation.evaluator import REFERENCE_STEPS, Evaluator, Scores
from rcm.evaluation.probes import Probes
from rcm.evaluation.report import save_grid, save_report, table
from rcm.presets import config_from_settings
from rcm.training.collapse import CollapseError, CollapseWatch, OnCollapse
from rcm.training.config import RunConfig
from rcm.training.files import load_weights, save_weights, write_atomically
from rcm.training.loop import train
from rcm.training.method import SCRATCH, TEACHER, Method
from rcm.training.resources import require_device, require_memory
from rcm.training.reuse import weights_of_other_runs
from rcm.training.run_folder import RunFolder, open_run_folder
from rcm.training.trainer import Trainer, Weights, build_networks, load_into

TEACHER_STEPS = (1, 2, 8, 32)
STUDENT_STEPS = (1, 2, 4)


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
        config, path, build=config.build_network, read_config=config_from_settings
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


def _run_in(folder: RunFolder, config: RunConfig, on_collapse: OnCollapse) -> None:
    started = time.monotonic()
    data = config.load_data()
    evaluator = Evaluator(data, config.data.classifier(data), config.student)
    restored = folder.last_checkpoint()
    for phase, state in restored.items():
        print(f"continuing {folder.path}: {phase}, iteration {state['iteration']}")

    def trainer(phase: str, method: Method, weights: dict[str, Weights], seed: int) -> Trainer:
        networks = build_networks(method.roles(), config.build_network, weights)
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
    teacher = config.build_network()
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
    facts = {
        "preset": config.preset,
        "method": config.method,
        "teacher_run": config.teacher_run,
        "seed": config.seed,
        "torch": torch.__version__,
    }
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
