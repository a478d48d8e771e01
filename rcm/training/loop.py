"""The training loop: steps a trainer to its end with metrics, checkpoints and reports."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from rcm.errors import RunError
from rcm.training.config import RunConfig
from rcm.training.run_folder import RunFolder
from rcm.training.trainer import Trainer


def train(
    trainer: Trainer, folder: RunFolder, config: RunConfig, report: Callable[[], None] | None = None
) -> None:
    """Continue until `trainer.iterations`; call `report` every `config.report_every` iterations.

    Raises:
        RunError: a loss, a gradient or an averaged weight is not finite.
        OSError: a file cannot be written.
    """
    progress = tqdm(
        desc=trainer.name, total=trainer.iterations, initial=trainer.iteration, disable=None
    )
    with progress:
        while trainer.iteration < trainer.iterations:
            metrics = trainer.step()
            folder.log(trainer.name, trainer.iteration, metrics)
            progress.update()
            if "loss" in metrics:
                progress.set_postfix(loss=f"{metrics['loss']:.3g}")
            reports = trainer.iteration % config.report_every == 0
            done = trainer.iteration == trainer.iterations
            saves = done or trainer.iteration % config.checkpoint_every == 0
            if reports or saves:
                _require_finite_weights(trainer)
            if reports and report is not None:
                report()
            if saves:
                folder.save_checkpoint(trainer.name, trainer.iteration, trainer.state_dict())


def _require_finite_weights(trainer: Trainer) -> None:
    if not all(weight.isfinite().all() for weight in trainer.weights().values()):
        raise RunError(f"iteration {trainer.iteration}: the averaged weights are not finite")
