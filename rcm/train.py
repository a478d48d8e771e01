"""Train a teacher and distil it into a few-step student, or distil a pretrained network.

    python -m rcm.train                              the preset `digits`, in runs/digits
    python -m rcm.train digits --method rcm          another method, in runs/digits-rcm
    python -m rcm.train digits --method scm --teacher runs/digits    with the teacher of that run
    python -m rcm.train wan-tiny                     a tiny Wan with random weights, on a laptop
    python -m rcm.train wan-tiny --dry-run           build everything, run a few steps

    1 GPU     python -m rcm.train wan2.1-t2v-1.3b-released --accumulation 8 \\
                  --model.folder Wan2.1-T2V-1.3B-Diffusers --data.folder latents
    8 GPUs    torchrun --standalone --nproc-per-node 8 -m rcm.train wan2.1-t2v-1.3b-released ...
    8 nodes   torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d \\
                  --rdzv-endpoint HOST:29500 -m rcm.train wan2.1-t2v-14b-paper \\
                  --mesh.ulysses 8 --accumulation 8 ...

Repeat the command to continue an interrupted run, on any number of ranks (docs/scale.md).
"""

from __future__ import annotations

import difflib
import io
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

from rcm import command_line
from rcm.distributed.processes import is_main
from rcm.distributed.rendezvous import Launch
from rcm.errors import OptionError, RunError
from rcm.presets import DEFAULT_PRESET, PRESETS, config_from_settings
from rcm.run import run
from rcm.training.collapse import OnCollapse
from rcm.training.config import FromScratchConfig, RunConfig
from rcm.training.reuse import with_teacher_settings
from rcm.training.run_folder import delete_run_folder


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Distil a pretrained network into a few-step student."""

    folder: Path
    """The run folder. It is created, or continued if it exists."""
    dry_run: bool = False
    """Build everything and run a few steps of each phase in a temporary folder."""
    method: str
    """The distillation method."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class FromScratchArguments(Arguments):
    """Train a teacher and distil it into a few-step student."""

    on_collapse: OnCollapse = "stop"
    """Stop a run whose student collapses, or explain it and continue."""


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code.

    It is 2 after an invalid option, 1 if the run cannot start or continue, 130 after an interrupt.
    """
    try:
        with _alike_on_every_rank():
            try:
                arguments = parse(argv)
                config = _with_teacher(arguments)
            except (OptionError, RunError) as error:
                return command_line.report(error)
        on_collapse: OnCollapse = "stop"
        if isinstance(arguments, FromScratchArguments):
            on_collapse = arguments.on_collapse
        if arguments.dry_run:
            with _dry_run_folder(arguments.folder) as folder:
                run(folder, config.shortened(), on_collapse)
            if is_main():
                print("dry run: everything was built and works")
        else:
            run(arguments.folder, config, on_collapse)
    except (OptionError, RunError) as error:
        return command_line.report(error)
    except KeyboardInterrupt as interrupt:
        where = "".join(f"; {note}" for note in getattr(interrupt, "__notes__", ()))
        if where or is_main():  # after the ranks have joined, one of them raises the interrupt
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
    config = preset.config(method)
    arguments = FromScratchArguments if isinstance(config, FromScratchConfig) else Arguments
    return command_line.parse(
        arguments,
        prog=f"python -m rcm.train {name}",
        args=options,
        default=arguments(folder=Path("runs") / folder, method=method, config=config),
    )


def _with_teacher(arguments: Arguments) -> RunConfig:
    """The settings, with those of another run's teacher if it shall be used.

    Raises OptionError and RunError.
    """
    config = arguments.config
    if not isinstance(config, FromScratchConfig):
        return config
    default = PRESETS[config.preset].config(arguments.method)
    assert isinstance(default, FromScratchConfig)
    return with_teacher_settings(
        config, arguments.folder, default=default, read_config=config_from_settings
    )


@contextmanager
def _alike_on_every_rank() -> Iterator[None]:
    """What all ranks print inside, help or an error, is printed by rank 0."""
    with ExitStack() as stack:
        if not is_main():
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


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
    longer = [other for other in known if name and other.startswith(name)]
    near = longer or difflib.get_close_matches(name, known, n=1)
    hint = f"; perhaps you meant {' or '.join(map(repr, near))}" if near else ""
    raise OptionError(f"unknown {kind} {name!r}{hint}. {kind.capitalize()}s: {', '.join(known)}")


@contextmanager
def _dry_run_folder(folder: Path) -> Iterator[Path]:
    """A run folder that is deleted afterwards.

    That of one process is a temporary one. Several ranks, which may be on several machines, share
    one beside the folder of the run. What a killed dry run left there is deleted first: no rank
    opens the folder before the main rank has joined the others.
    """
    if Launch.from_environment() is not None:
        shared = folder.with_name(f".{folder.name}.dry-run")
        if is_main():
            delete_run_folder(shared)
        try:
            yield shared
        finally:
            if is_main():
                with suppress(OptionError, RunError):  # such as another dry run that uses it now
                    delete_run_folder(shared)
        return
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as error:
        raise OptionError(f"--dry-run finds no temporary folder ({error}); set TMPDIR") from error
    with temporary as path:
        yield Path(path) / "dry-run"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
