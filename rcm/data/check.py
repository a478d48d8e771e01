"""Check a folder of latents and embeddings before a run needs it.

    python -m rcm.data.check FOLDER \\
        --latents 16,21,60,104 --condition prompt_embeds=512,4096

prints a line for each bad sample or file, with its row or key, its shape and what was expected,
then a summary. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rcm.data.latents import open_latents
from rcm.data.samples import LATENTS, SampleShapes, Shape
from rcm.errors import RunError

NORMALISED_STD = (0.7, 1.4)  # of all latents together; of single ones it varies more


@dataclass(frozen=True)
class CheckReport:
    """What a check found."""

    problems: list[str]
    """One for each bad sample or file; each starts with the file."""
    good: int
    """Number of samples that training can use."""
    mean: float
    """Mean and standard deviation of the good samples' latents; NaN without any."""
    std: float

    def __str__(self) -> str:
        summary = (
            f"{self.good} good samples, {len(self.problems)} problems; "
            f"latents: mean {self.mean:.3f}, standard deviation {self.std:.3f}"
        )
        low, high = NORMALISED_STD
        if self.good and not low <= self.std <= high:
            summary += (
                ". Normalised latents have about 1: apply the VAE's latents_mean and latents_std, "
                "or its shift_factor and scaling_factor, before saving"
            )
        return summary


def check_latents(
    folder: Path,
    shapes: SampleShapes,
    first: int | None = None,
    on_problem: Callable[[str], object] = print,
) -> CheckReport:
    """Read all samples of a folder, or the first ones; on_problem is told of each as it is found.

    All headers are checked in any case.
    """
    problems: list[str] = []

    def report(problem: str) -> None:
        problems.append(problem)
        on_problem(problem)

    count, good, total, squares = 0, 0, 0.0, 0.0
    try:
        data, found = open_latents(folder, shapes)
    except RunError as error:
        report(str(error))
        return CheckReport(problems, 0, math.nan, math.nan)
    for problem in found:
        report(problem)
    for index in tqdm(range(len(data))[:first], unit="samples", disable=None):
        try:
            latents = data.sample(index)[LATENTS].double()
        except RunError as error:
            report(str(error))
            continue
        good += 1
        count += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    mean = total / count if count else math.nan
    std = math.sqrt(max(squares / count - mean**2, 0)) if count else math.nan
    return CheckReport(problems, good, mean, std)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m rcm.data.check")
    parser.add_argument(
        "folder", type=Path, help="shards, and negative.safetensors if there is one"
    )
    parser.add_argument(
        "--latents",
        type=_shape,
        required=True,
        metavar="SHAPE",
        help="channels,frames,height,width of a sample, such as 16,21,60,104; images: no frames",
    )
    parser.add_argument(
        "--condition",
        type=_named_shape,
        action="append",
        default=[],
        metavar="NAME=SHAPE",
        help="a tensor of the condition, such as prompt_embeds=512,4096; can be repeated",
    )
    parser.add_argument(
        "--fixed",
        action="append",
        default=[],
        metavar="NAME",
        help="a tensor of the condition that guidance keeps and negative.safetensors lacks, such "
        "as image_latents; can be repeated",
    )
    parser.add_argument(
        "--first", type=_positive, metavar="N", help="read only the first N samples"
    )
    options = parser.parse_args(arguments)
    condition = dict(options.condition)
    for name in options.fixed:
        if name not in condition:
            names = ", ".join(condition) or "none"
            parser.error(f"--fixed {name}: there is no --condition {name}=SHAPE, only {names}")
    shapes = SampleShapes(options.latents, condition, frozenset(options.fixed))
    report = check_latents(options.folder, shapes, options.first, tqdm.write)
    print(report)
    return 1 if report.problems else 0


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _shape(text: str) -> Shape:
    return tuple(_positive(size) for size in text.split(","))


def _named_shape(text: str) -> tuple[str, Shape]:
    name, _, shape = text.partition("=")
    return name, _shape(shape)


if __name__ == "__main__":
    sys.exit(main())
