"""Score the networks of a run again, with every metric and with noise that the run has not seen.

    python -m rcm.evaluate runs/digits                                  # teacher and student
    python -m rcm.evaluate runs/digits-scm --mid-times 0.7 1.1 1.3,1.0,0.6  # other schedules
    python -m rcm.evaluate runs/digits --features pixels --seed 1

It prints a table and writes evaluation.json and evaluation.safetensors into the run folder. The run
may still be training; its last report is then scored.

Scores flatter what was chosen by them. The settings of the presets were chosen by the noise of
reports (rcm/evaluation/evaluator.py). The noise of this command has chosen nothing until its scores
are used to choose, for example one of --mid-times: then report the scores of another --seed. The
real samples are those that the teacher was trained on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from rcm import command_line
from rcm.data.dataset import Dataset, LabelledData, evenly_spaced, require_same_facts
from rcm.distributed.processes import local_device
from rcm.errors import OptionError, RunError
from rcm.evaluation.enough import require_enough
from rcm.evaluation.evaluator import (
    EVALUATION_SEED,
    REFERENCE,
    REFERENCE_STEPS,
    Evaluator,
    Reference,
    Source,
    student_source,
)
from rcm.evaluation.features import named_features
from rcm.evaluation.kept_reference import load_reference, reference_file, save_reference
from rcm.evaluation.report import table
from rcm.trained_networks import load_network, read_config, reported_iteration
from rcm.training.config import FromScratchConfig
from rcm.training.files import save_weights, write_atomically
from rcm.training.run_folder import STUDENT_WEIGHTS, TEACHER_WEIGHTS, read_facts
from rcm.validation import require_integer

MAX_TEACHER_STEPS = 1000
STUDENT_STEPS = (1, 2, 4)
JSON, TENSORS = "evaluation.json", "evaluation.safetensors"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score the networks of a run again, with noise that the run has not seen."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    steps: tuple[int, ...] | None = None
    """Numbers of steps of the student; by default 1, 2 and 4, as far as its schedule goes."""
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of Heun steps of the teacher; n steps are 2 n - 1 network evaluations."""
    mid_times: tuple[str, ...] = ()
    """More schedules of the student, such as: 1.1 1.3,1.0,0.6. One of n times has n + 1 steps."""
    seed: int = 0
    """Seed of the noise. The noise of no seed is that of a training's reports."""
    samples: int | None = None
    """Number of samples, generated and real, evenly spaced in the data; by default those
    of the run's reports."""
    features: str = "classifier"
    """Where samples are compared: classifier, pixels, inception, or package.module:function, a
    function of yours that returns a torch module or another callable: samples -> (n, dim)."""
    reference_folder: Path | None = None
    """A folder that keeps the teacher's samples with 32 steps, which all others are compared with:
    those of one teacher, noise and data are then drawn once for all of its students."""
    out: Path | None = None
    """The JSON file to write instead of evaluation.json and evaluation.safetensors in the run
    folder."""

    def __post_init__(self) -> None:
        for steps in self.steps or ():
            require_integer(1, steps=steps)
        for steps in self.teacher_steps:
            require_integer(1, MAX_TEACHER_STEPS, teacher_steps=steps)
        require_integer(0, seed=self.seed)
        if self.samples is not None:
            require_integer(1, samples=self.samples)

    @property
    def noise_seed(self) -> int:
        """Of the initial noise; that of later steps has the next one, which no other seed has."""
        return EVALUATION_SEED + 2 * self.seed


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code.

    It is 2 after an invalid option, 1 after an error, 130 after an interrupt.
    """
    try:
        evaluate(command_line.parse(Arguments, prog="python -m rcm.evaluate", args=argv))
    except (OptionError, RunError) as error:
        return command_line.report(error)
    except KeyboardInterrupt:
        print("\ninterrupted; no scores were written", file=sys.stderr)
        return 130
    return 0


def evaluate(arguments: Arguments) -> None:
    """Print the table and write the files.

    Raises:
        OptionError: the folder is not a run folder, an option does not suit the run, or the files
            cannot be written.
        RunError: the run has no student yet, its files are damaged, its data cannot be read or
            changed, there are too few samples to score, or samples are not finite.
    """
    config = read_config(arguments.run)
    titled = _sources(arguments, config)
    _require_writable(arguments)
    device = local_device(config.device)
    torch.set_num_threads(config.threads)
    iteration = reported_iteration(arguments.run, config)
    teacher = load_network(arguments.run, TEACHER_WEIGHTS, config, device)
    student = load_network(arguments.run, STUDENT_WEIGHTS, config, device)
    data = config.load_data()
    require_same_facts(
        read_facts(arguments.run),
        data.facts,
        origin=f"{arguments.run} was trained on",
        remedy="restore them",
    )
    chosen = _chosen(arguments, config, data).to(device)
    require_enough(chosen, remedy="a larger --samples or more images per class")
    features = named_features(arguments.features, chosen)
    evaluator = Evaluator(
        chosen,
        config.data.classifier(data).to(device),
        config.student,
        features=features,
        noise_seed=arguments.noise_seed,
    )
    rows = {f"real {config.data.name}, half against half": evaluator.real_row()}
    # Of the data, the reference and the student with the run's own times.
    panels = {"data": chosen.samples}
    drawn = [source for source in titled.values() if source != REFERENCE]
    kept, reference = _kept_reference(arguments, evaluator, config)
    if reference is None:
        drawn.insert(0, REFERENCE)
    with evaluator.progress(f"scoring {arguments.run}", drawn, shown=True) as counted:
        if reference is None:
            reference = evaluator.reference(counted(teacher))
            if kept is not None:
                save_reference(kept, reference.samples)
        panels[f"teacher-{REFERENCE_STEPS}"] = reference.samples
        for title, source in titled.items():
            if source.network == "teacher":
                rows[title] = evaluator.teacher_row(counted(teacher), source, reference)
                continue
            samples = evaluator.student_samples(counted(student), source)
            rows[title] = evaluator.row(source, samples, reference)
            if title == str(source):
                panels[f"student-{source.steps}"] = samples
    print(table(rows))
    content = {
        "preset": config.preset,
        "method": config.method,
        "seed": config.seed,
        "teacher_run": config.teacher_run,
        "iterations": iteration,
        "batch": config.student.batch,
        "torch": torch.__version__,
        "protocol": {
            "noise_seed": arguments.noise_seed,
            "samples": len(chosen),
            "features": arguments.features,
            "reference_steps": REFERENCE_STEPS,
        },
        "rows": [row.as_dict() for row in rows.values()],
    }
    first = evaluator.first_of_each_class().flatten()
    shown = {name: images[first] for name, images in {**panels, "labels": chosen.labels}.items()}
    _write(arguments, content, shown)


def _sources(arguments: Arguments, config: FromScratchConfig) -> dict[str, Source]:
    """What to score, by the title of its row. Raises OptionError."""
    student, longest = config.student, config.student.max_steps
    found = [Source(network="teacher", steps=steps) for steps in arguments.teacher_steps]
    steps = arguments.steps
    if steps is None:
        steps = tuple(n for n in STUDENT_STEPS if n <= longest)
    elif max(steps, default=0) > longest:
        raise OptionError(
            f"--steps is {max(steps)}; it must be in 1..{longest}, because the student of this run "
            "has no times for more"
        )
    found += [student_source(student, n) for n in steps]
    titled = {str(source): source for source in found}
    for schedule in arguments.mid_times:
        times = _times(schedule)
        try:
            student.with_mid_times(times)
        except ValueError as error:
            raise OptionError(f"--mid-times {schedule}: {error}") from error
        source = student_source(student, len(times) + 1, times)
        if source not in titled.values():
            name = "mid time" if len(times) == 1 else "mid times"
            titled[f"{source}, {name} {', '.join(f'{time:g}' for time in times)}"] = source
    return titled


def _times(schedule: str) -> tuple[float, ...]:
    try:
        return tuple(float(time) for time in schedule.split(","))
    except ValueError as error:
        raise OptionError(
            f"--mid-times is {schedule!r}; it must be numbers, with commas between those of one "
            "schedule: 0.9 1.1 1.3,1.0,0.6"
        ) from error


def _chosen(arguments: Arguments, config: FromScratchConfig, data: LabelledData) -> Dataset:
    """The samples to compare with. Raises OptionError."""
    count = arguments.samples
    if count is None:
        count = config.evaluation_samples
    else:
        # Half of them must contain two of one class, and more samples than neighbours.
        low = 2 * max(data.facts.classes, 4) + 2
        if not low <= count <= len(data):
            raise OptionError(
                f"--samples is {count}; it must be in {low}..{len(data)}, the number of samples of "
                "the data"
            )
    return data.subset(evenly_spaced(count, len(data)))


def _kept_reference(
    arguments: Arguments, evaluator: Evaluator, config: FromScratchConfig
) -> tuple[Path | None, Reference | None]:
    """The file of --reference-folder, and its reference if it is there. Raises RunError."""
    folder = arguments.reference_folder
    if folder is None:
        return None, None
    file = reference_file(folder, evaluator, config, arguments.run / TEACHER_WEIGHTS)
    if not file.exists():
        return file, None
    return file, evaluator.as_reference(load_reference(file, evaluator.noise))


def _require_writable(arguments: Arguments) -> None:
    """Raise OptionError if the results cannot be written, or would replace another file."""
    folder = arguments.reference_folder
    if folder is not None and folder.exists() and not folder.is_dir():
        raise OptionError(f"--reference-folder is {folder}; it must be a folder")
    if arguments.out is None:
        command_line.require_writable(arguments.run / JSON)
        return
    command_line.require_writable(arguments.out)
    if arguments.out.exists() and not _is_evaluation(arguments.out):
        raise OptionError(f"--out is {arguments.out}; it exists and is no evaluation of a run")


def _is_evaluation(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"protocol", "rows"} <= content.keys()


def _write(arguments: Arguments, content: dict[str, Any], samples: dict[str, Tensor]) -> None:
    """Raises RunError."""
    out = arguments.out or arguments.run / JSON
    try:
        if arguments.out is None:
            save_weights(arguments.run / TENSORS, {n: x.cpu() for n, x in samples.items()})
        write_atomically(out, json.dumps(content, indent=2).encode())
    except OSError as error:
        raise RunError(f"writing {out} failed ({error.strerror or error})") from error
    print(f"written: {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
