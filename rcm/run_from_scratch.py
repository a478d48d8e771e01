"""A run on labelled data: train a teacher, distil it, score both with a classifier."""

from __future__ import annotations

import time
from functools import cache
from itertools import chain

import torch
from torch import nn
from tqdm import tqdm

from rcm.data.dataset import DataFacts, LabelledData, evenly_spaced
from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.layout import Layout
from rcm.distributed.sharding import shard
from rcm.errors import RunError
from rcm.evaluation.enough import require_enough
from rcm.evaluation.evaluator import (
    REFERENCE,
    Evaluator,
    Reference,
    Row,
    Source,
    student_source,
)
from rcm.evaluation.probes import Probes
from rcm.evaluation.report import save_grid, save_report, table
from rcm.training.collapse import CollapseWatch, OnCollapse
from rcm.training.config import FromScratchConfig
from rcm.training.files import load_weights, save_weights
from rcm.training.loop import announce, phase_text, train
from rcm.training.manifest import Checkpoint
from rcm.training.method import SCRATCH, TEACHER, Method
from rcm.training.run_folder import RunFolder
from rcm.training.trainer import Trainer, Weights, build_networks, load_into

TEACHER_STEPS = (1, 2, 8, 32)
STUDENT_STEPS = (1, 2, 4)


def run_from_scratch(
    folder: RunFolder,
    config: FromScratchConfig,
    data: LabelledData,
    device: torch.device,
    on_collapse: OnCollapse,
) -> None:
    """Do what is left: teacher, student, report. Raises RunError."""
    started = time.monotonic()
    layout = folder.layout
    facts = data.facts
    with errors_on_every_rank():
        if layout.is_main:
            folder.save_facts(facts)
    last = folder.last_checkpoint()
    if last is not None and layout.is_main:
        print(f"continuing {folder.path}: {last.phase}, iteration {last.iteration}")
    phases = _phases(config, last, trains_teacher=not folder.teacher_weights.exists())
    _announce(layout, [f"classifier of {config.data.name}", *phases])
    evaluated = data.subset(evenly_spaced(config.evaluation_samples, len(data))).to(device)
    require_enough(evaluated, remedy="more images per class or a larger --evaluation-samples")
    classifier = config.data.classifier(data).to(device)
    evaluator = Evaluator(evaluated, classifier, config.student)
    real = evaluator.real_row()  # before anything is trained, because it may not be possible

    def trainer(phase: str, method: Method, weights: dict[str, Weights], seed: int) -> Trainer:
        def make(start: str) -> nn.Module:
            known = None if start == SCRATCH else weights[start]
            return _network(config, facts, known, layout, device)

        networks = build_networks(method.roles(), make)
        built = Trainer(
            phase,
            method,
            networks,
            data,
            seed=seed,
            layout=layout,
            accumulation=config.accumulation,
            device=device,
        )
        if last is not None and last.phase == phase:
            folder.restore(built, last)
        return built

    if not folder.teacher_weights.exists():
        if last is not None and last.phase == "student":
            raise RunError(f"{folder.teacher_weights} is missing, but the student needs it")
        training = trainer("teacher", config.teacher, {}, 2 * config.seed)
        train(training, folder, checkpoint_every=config.checkpoint_every)
        folder.save_weights(folder.teacher_weights, training.weights())
        _announce(layout, phases[1:])
    weights = {TEACHER: load_weights(folder.teacher_weights)}
    if config.student.start not in (TEACHER, SCRATCH):
        weights[config.student.start] = load_weights(folder.start_weights)
    distillation = trainer("student", config.student, weights, 2 * config.seed + 1)
    teacher = distillation.networks.get(TEACHER)
    if teacher is None:
        teacher = _network(config, facts, weights[TEACHER], layout, device)
    with evaluator.progress("sampling the teacher", [REFERENCE], shown=layout.is_main) as counted:
        reference = evaluator.reference(counted(teacher))

    @cache  # the report of the last iteration has its final scores
    def student_rows(iteration: int) -> dict[str, Row]:
        return _evaluate_student(distillation, evaluator, reference, folder, facts)

    def report() -> None:
        for name, row in student_rows(distillation.iteration).items():
            metrics = {"samples": name, **row.scores.as_dict()}
            folder.log(distillation.name, distillation.iteration, metrics)
            if layout.is_main:
                tqdm.write(f"{distillation.iteration:5d}  {name:15s}  {row.scores}")

    probes = Probes(evaluated, classifier, config.student, teacher)
    watch = CollapseWatch(
        probes.measure, probes.teacher_rmse(), every=config.probe_every, on_collapse=on_collapse
    )
    if last is not None and last.phase == "student":
        watch.load_state_dict(last.facts["watch"])
    train(
        distillation,
        folder,
        checkpoint_every=config.checkpoint_every,
        report_every=config.report_every,
        report=report,
        watch=watch,
    )
    _announce(layout, phases[-1:])
    rows = {f"real {config.data.name}, half against half": real}
    sources = [Source(network="teacher", steps=steps) for steps in TEACHER_STEPS]
    with evaluator.progress("scoring the teacher", sources, shown=layout.is_main) as counted:
        for source in sources:
            rows[str(source)] = evaluator.teacher_row(counted(teacher), source, reference)
    rows |= student_rows(distillation.iteration)
    origin = {
        "preset": config.preset,
        "method": config.method,
        "teacher_run": config.teacher_run,
        "seed": config.seed,
        "torch": torch.__version__,
    }
    if layout.is_main:
        save_report(folder.path, rows, origin)
        print(table(rows))
        print(f"{time.monotonic() - started:.0f} s; samples: {folder.path / 'grid.png'}")


def _phases(
    config: FromScratchConfig, last: Checkpoint | None, *, trains_teacher: bool
) -> list[str]:
    """What is left of a run, for people."""
    done = {"teacher": 0, "student": 0} | ({} if last is None else {last.phase: last.iteration})
    phases = [phase_text("teacher", config.teacher, done["teacher"])] if trains_teacher else []
    if done["student"] < config.student.iterations:
        student = f"student ({config.method})"
        phases.append(phase_text(student, config.student, done["student"]))
    return [*phases, "scores"]


def _announce(layout: Layout, phases: list[str]) -> None:
    if layout.is_main:
        announce(phases)


def _network(
    config: FromScratchConfig,
    facts: DataFacts,
    weights: Weights | None,
    layout: Layout,
    device: torch.device,
) -> nn.Module:
    """A network with these weights, or new ones, sharded if there are several ranks."""
    network = config.build_network(facts).to(device)
    if weights is not None:
        load_into(network, weights, "the weights of the run")
    if layout.size > 1:
        lists = [module for module in network.children() if isinstance(module, nn.ModuleList)]
        # What a loss may call beside the network's forward; see ModelConfig.build.
        log_weight = getattr(network, "log_weight", None)
        heads = getattr(network, "heads", None)
        shard(
            network,
            [*chain.from_iterable(lists), *([] if log_weight is None else [log_weight])],
            layout.parameter_mesh,
            data_size=layout.data_size,
            methods=[] if heads is None else ["heads"],
        )
    return network


def _evaluate_student(
    trainer: Trainer,
    evaluator: Evaluator,
    reference: Reference,
    folder: RunFolder,
    facts: DataFacts,
) -> dict[str, Row]:
    """Score the averaged student, draw its grid and save its weights."""
    sources = [
        student_source(evaluator.config, steps)
        for steps in STUDENT_STEPS
        if steps <= evaluator.config.max_steps
    ]
    with (
        evaluator.progress("scoring the student", sources, shown=folder.layout.is_main) as counted,
        trainer.averaged() as student,
    ):
        samples = {s: evaluator.student_samples(counted(student), s) for s in sources}
    panels = {"data": evaluator.data.samples, str(REFERENCE): reference.samples}
    panels |= {str(source): samples[source] for source in sources[:2]}
    chosen = evaluator.first_of_each_class()
    shown = {title: images[chosen.flatten()] for title, images in panels.items()}
    weights = trainer.weights()
    if folder.layout.is_main:
        for path in (folder.grids / f"{trainer.iteration:07d}.png", folder.path / "grid.png"):
            save_grid(path, shown, rows=len(chosen), black=facts.black, white=facts.white)
        save_weights(folder.student_weights, weights)
    return {str(s): evaluator.row(s, images, reference) for s, images in samples.items()}
