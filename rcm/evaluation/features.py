"""Networks in whose features samples are compared, by the name that a command uses.

classifier                the data set's own classifier
pixels                    the samples themselves, flattened
inception                 the network of FID (1706.08500), of torch-fidelity; it downloads weights
package.module:function   what a function of yours returns: a torch module, or any callable, that
                          maps samples (n, ...) in units of σd to features (n, dim)
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn

from rcm.data.dataset import Dataset
from rcm.errors import OptionError, RunError
from rcm.evaluation.evaluator import Features

IMPORTED = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")
INCEPTION_BATCH = 64  # images of 299×299 pixels


def named_features(name: str, data: Dataset) -> Features | None:
    """The features of that name, on the device of the data; None are those of the classifier.

    Raises:
        OptionError: the name is unknown, cannot be imported, or does not suit the data.
        RunError: the weights of Inception cannot be loaded.
    """
    if name == "classifier":
        return None
    if name == "pixels":
        return lambda samples: samples.flatten(1)
    if name == "inception":
        return _inception(data)
    return _imported(name, data.samples.device)


def _imported(name: str, device: torch.device) -> Features:
    match = IMPORTED.fullmatch(name)
    if match is None:
        raise OptionError(
            f"--features is {name!r}; it must be classifier, pixels, inception or "
            "package.module:function"
        )
    module, function = match.groups()
    with _explained(name, "cannot be used", OptionError):
        network = attrgetter(function)(importlib.import_module(module))()
        if not callable(network):
            raise TypeError(f"it returns a {type(network).__name__}, which cannot be called")
        if isinstance(network, nn.Module):
            network.to(device).eval()

    def features(samples: Tensor) -> Tensor:
        with _explained(name, "failed", RunError):
            found = network(samples)
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(samples):
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"expected features ({len(samples)}, dim), got {shape}")
            return found

    return features


@contextmanager
def _explained(name: str, problem: str, kind: type[Exception]) -> Iterator[None]:
    """Raise an error of foreign code, in one line."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {_one_line(error)}"
        raise kind(f"--features {name} {problem} ({text})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _inception(data: Dataset) -> Features:
    """The 2048 features of FID. The real samples' range becomes 0..255; gray becomes RGB."""
    shape = tuple(data.samples.shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise OptionError(f"--features inception needs images of 1 or 3 channels, not {shape}")
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError, OSError) as error:  # also of a torchvision for another torch
        raise OptionError(
            f"--features inception needs torch-fidelity ({_one_line(error)}): "
            "pip install '.[inception]'"
        ) from error
    try:
        with _tensors_only():
            network = FeatureExtractorInceptionV3("inception", ["2048"])
    except Exception as error:  # a damaged file raises any
        reason = _one_line(error).partition(". ")[0]  # torch goes on with unsafe advice
        raise RunError(
            f"the weights of Inception cannot be loaded ({reason}); torch-fidelity downloads them "
            f"into {torch.hub.get_dir()}/checkpoints"
        ) from error
    network.to(data.samples.device)
    low, high = data.samples.aminmax()

    def features(samples: Tensor) -> Tensor:
        bytes_ = ((samples - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        rgb = bytes_.expand(-1, 3, -1, -1)
        return torch.cat([network(batch)[0] for batch in rgb.split(INCEPTION_BATCH)])

    return features


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Inside, torch.load unpickles tensors only; torch-fidelity would unpickle anything."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
