"""The training loop: steps a method to its end with metrics, checkpoints and reports."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from rcm.training.config import RunConfig
from rcm.training.method import Method
from rcm.training.run_folder import RunFolder


def train(
    method: Method, folder: RunFolder, config: RunConfig, report: Callable[[], None] | None = None
) -> None:
    """Continue until `method.iterations`; call `report` every `config.report_every` iterations.

    Raises:
        RunError: a loss or a gradient is not finite.
        OSError: a file cannot be written.
    """
    progress = tqdm(
        desc=method.name, total=method.iterations, initial=method.iteration, disable=None
    )
    with progress:
        while method.iteration < method.iterations:
            metrics = method.step()
            folder.log(method.name, method.iteration, metrics)
            progress.update()
            if "loss" in metrics:
                progress.set_postfix(loss=f"{metrics['loss']:.3g}")
            if report is not None and method.iteration % config.report_every == 0:
                report()
            done = method.iteration == method.iterations
            if done or method.iteration % config.checkpoint_every == 0:
                folder.save_checkpoint(method.name, method.iteration, method.state_dict())
