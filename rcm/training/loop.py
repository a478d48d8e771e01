"""The training loop: steps a method to its end with metrics, checkpoints and reports."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from rcm.errors import RunError
from rcm.training.config import RunConfig
from rcm.training.method import Method
from rcm.training.run_folder import RunFolder


def train(
    method: Method, folder: RunFolder, config: RunConfig, report: Callable[[], None] | None = None
) -> None:
    """Continue until `method.iterations`; call `report` every `config.report_every` iterations.

    Raises:
        RunError: a loss, a gradient or an averaged weight is not finite.
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
            reports = method.iteration % config.report_every == 0
            done = method.iteration == method.iterations
            saves = done or method.iteration % config.checkpoint_every == 0
            if reports or saves:
                _require_finite_weights(method)
            if reports and report is not None:
                report()
            if saves:
                folder.save_checkpoint(method.name, method.iteration, method.state_dict())


def _require_finite_weights(method: Method) -> None:
    if not all(weight.isfinite().all() for weight in method.weights().values()):
        raise RunError(f"iteration {method.iteration}: the averaged weights are not finite")
