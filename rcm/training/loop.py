"""The training loop: steps a trainer to its end with metrics, probes, checkpoints and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tqdm import tqdm

from rcm.distributed.agreement import on_every_rank
from rcm.errors import RunError
from rcm.training.collapse import PATIENCE, CollapseError, CollapseWatch
from rcm.training.method import Method
from rcm.training.run_folder import RunFolder
from rcm.training.trainer import Trainer


def phase_text(name: str, method: Method, done: int = 0) -> str:
    """For `announce`: a phase, such as "teacher, 4000 iterations of 64"."""
    unit = "iteration" if method.iterations == 1 else "iterations"
    text = f"{name}, {method.iterations} {unit} of {method.batch}"
    return f"{text} from iteration {done}" if done else text


def announce(phases: Sequence[str]) -> None:
    """Print what comes next. Call it on the main rank."""
    tqdm.write(f"next: {'; then '.join(phases)}")


def train(
    trainer: Trainer,
    folder: RunFolder,
    *,
    checkpoint_every: int,
    report_every: int | None = None,
    report: Callable[[], None] | None = None,
    watch: CollapseWatch | None = None,
) -> None:
    """Continue until `trainer.iterations`; call `report` every `report_every` iterations.

    watch probes a student before the first iteration and every `watch.every` iterations.

    Raises:
        RunError: a loss, a gradient, an averaged weight or a probe is not finite.
        CollapseError: the student collapsed, and the watch is to stop then.
        OSError: a file cannot be written.
    """
    progress = tqdm(
        desc=trainer.name,
        total=trainer.iterations,
        initial=trainer.iteration,
        disable=None if folder.layout.is_main else True,
    )
    with progress:
        if watch is not None and trainer.iteration == 0:
            folder.log(trainer.name, 0, watch.probe(trainer))
        while trainer.iteration < trainer.iterations:
            metrics = trainer.step()
            folder.log(trainer.name, trainer.iteration, metrics)
            progress.update()
            if folder.layout.is_main and any(name.endswith("skipped") for name in metrics):
                tqdm.write(f"iteration {trainer.iteration}: not finite, the update was skipped")
            if "loss" in metrics:
                progress.set_postfix(loss=f"{metrics['loss']:.3g}")
            if watch is not None and trainer.iteration % watch.every == 0:
                folder.log(trainer.name, trainer.iteration, watch.probe(trainer))
                if watch.collapsed:
                    _handle_collapse(watch, trainer, folder)
            reports = report_every is not None and trainer.iteration % report_every == 0
            saves = trainer.iteration == trainer.iterations or (
                trainer.iteration % checkpoint_every == 0
                and (watch is None or watch.allows_checkpoint)
            )
            if reports or saves:
                _require_finite_weights(trainer)
            if reports and report is not None:
                report()
            if saves:
                facts = {} if watch is None else {"watch": watch.state_dict()}
                folder.save_checkpoint(trainer.name, trainer.iteration, trainer.state_dict(), facts)
        folder.checkpoints.finish()


def _handle_collapse(watch: CollapseWatch, trainer: Trainer, folder: RunFolder) -> None:
    if watch.on_collapse == "continue" and watch.streak > PATIENCE:
        return  # this collapse has been explained
    explanation = "the student collapsed"
    if folder.layout.is_main:  # which writes the metrics, and prints
        explanation = watch.explain(trainer.iteration, folder.metrics(trainer.name))
    if watch.on_collapse == "continue":
        if folder.layout.is_main:
            tqdm.write(explanation)
        return
    good = folder.describe_good_checkpoint(trainer.name, watch.streak_start(trainer.iteration))
    raise on_every_rank(CollapseError(f"{explanation}; {good}"))


def _require_finite_weights(trainer: Trainer) -> None:
    if not trainer.has_finite_weights():
        problem = f"iteration {trainer.iteration}: the averaged weights are not finite"
        raise on_every_rank(RunError(problem))
