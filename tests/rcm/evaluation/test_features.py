"""Feature networks by name."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.data.dataset import Dataset
from rcm.errors import OptionError, RunError
from rcm.evaluation.features import named_features

MODULE = """
import torch

def halved():
    return lambda samples: samples.flatten(1) / 2

class Networks:
    @staticmethod
    def linear():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(12, 2))

def nothing():
    return None

def fails():
    raise KeyError("no\\nweights")

def images():
    return lambda samples: samples

def broken():
    return lambda samples: samples @ samples[:, :1].flatten()
"""


@pytest.fixture
def data() -> Dataset:
    return Dataset(torch.randn(6, 3, 2, 2).clamp(-1, 1), torch.arange(6) % 2, 2)


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_features.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_features", raising=False)


def features(name: str, data: Dataset) -> Tensor:
    function = named_features(name, data)
    assert function is not None
    return function(data.samples)


def test_features_by_name(data: Dataset) -> None:
    assert named_features("classifier", data) is None
    assert torch.equal(features("pixels", data), data.samples.reshape(6, 12))
    assert torch.equal(features("own_features:halved", data), data.samples.reshape(6, 12) / 2)


def test_a_module_is_used_without_dropout(data: Dataset) -> None:
    function = named_features("own_features:Networks.linear", data)
    assert function is not None
    assert torch.equal(function(data.samples), function(data.samples))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pixel", "it must be classifier, pixels, inception or package.module:function"),
        ("own_features", "it must be classifier, pixels"),
        ("own_features:__import__('os')", "it must be classifier, pixels"),
        ("own_features:", "it must be"),
        ("../own_features:halved", "it must be"),
        ("absent.module:f", "cannot be used (ModuleNotFoundError: No module named 'absent')"),
        ("own_features:absent", "cannot be used (AttributeError: "),
        ("own_features:nothing", "it returns a NoneType, which cannot be called"),
        ("own_features:fails", r"cannot be used (KeyError: 'no\nweights')"),
    ],
)
def test_a_name_that_gives_no_features_is_an_invalid_option(
    name: str, words: str, data: Dataset
) -> None:
    with pytest.raises(OptionError) as caught:
        named_features(name, data)
    assert words in str(caught.value)
    assert "--features" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("images", "expected features (6, dim), got (6, 3, 2, 2)"),
        ("broken", "failed (RuntimeError: "),
    ],
)
def test_features_that_fail_are_explained(name: str, words: str, data: Dataset) -> None:
    with pytest.raises(RunError) as caught:
        features(f"own_features:{name}", data)
    assert words in str(caught.value)


class FakeInception(torch.nn.Module):
    """Stands for torch-fidelity's network, which needs weights from the network."""

    def __init__(self, name: str, features: list[str]) -> None:
        super().__init__()
        assert features == ["2048"]

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        assert len(images) <= 64
        return (images.flatten(1).float(),)


def with_torch_fidelity(monkeypatch: pytest.MonkeyPatch, network: Any) -> None:
    library = ModuleType("torch_fidelity")
    library.FeatureExtractorInceptionV3 = network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)


def test_inception_sees_bytes_of_the_range_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch_fidelity(monkeypatch, FakeInception)
    gray = torch.linspace(-1, 3, 100).view(100, 1, 1, 1)
    function = named_features("inception", Dataset(gray, torch.zeros(100).long(), 1))
    assert function is not None
    found = function(torch.tensor([-1.0, 1, 3, 9, -9]).view(5, 1, 1, 1))
    assert found.tolist() == [[v] * 3 for v in (0, 128, 255, 255, 0)]
    assert len(function(gray)) == 100


def test_inception_without_its_library_or_images_is_an_invalid_option(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(OptionError, match=r"needs torch-fidelity .*pip install '.\[inception\]'"):
        named_features("inception", data)
    latents = Dataset(torch.randn(6, 4, 2, 2), data.labels, 2)
    with pytest.raises(OptionError, match=r"1 or 3 channels, not \(4, 2, 2\)"):
        named_features("inception", latents)


def test_inception_loads_tensors_only(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(Path, tmp_path / "weights.pth")  # an object that is no tensor

    def loads(name: str, features: list[str]) -> Any:
        return torch.load(tmp_path / "weights.pth", weights_only=False)  # as the library

    with_torch_fidelity(monkeypatch, loads)
    with pytest.raises(RunError, match="the weights of Inception cannot be loaded") as caught:
        named_features("inception", data)
    assert "\n" not in str(caught.value)
    assert torch.load(tmp_path / "weights.pth", weights_only=False) is Path


def test_weights_that_cannot_be_downloaded_or_read_are_explained(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (OSError, IndexError):  # offline; a damaged file

        def fails(name: str, features: list[str], error: type[Exception] = error) -> Any:
            raise error("no weights")

        with_torch_fidelity(monkeypatch, fails)
        problem = r"\(no weights\); torch-fidelity downloads them into .*hub"
        with pytest.raises(RunError, match=problem):
            named_features("inception", data)
