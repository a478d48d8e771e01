"""Single files of a run: written aside, renamed into place."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from rcm.errors import RunError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either the whole new file or the old one."""
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors as a safetensors file, atomically."""
    content = safetensors_bytes({name: w.detach().contiguous() for name, w in weights.items()})
    write_atomically(path, content)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except SafetensorError as error:
        raise RunError(
            f"{path} is damaged ({error}); delete it and repeat the command to make it again"
        ) from error


@contextmanager
def readable(what: str = "a file") -> Iterator[None]:
    """Raise RunError, in one line, for what reading files raises; what: named in the message."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # the last two of a damaged .gz
        raise RunError(f"{what} cannot be read: {error}") from error
    except ImportError as error:  # of an optional package; the message says what to do
        raise RunError(str(error)) from error
