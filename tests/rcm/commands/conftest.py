"""A run so small that it takes seconds, shared by the tests of the commands."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rcm.data.dataset import Dataset
from rcm.data.digits import DigitsConfig, load_digits, train_classifier
from tests.rcm.commands.tiny_run import start


@pytest.fixture(scope="package", autouse=True)
def _small_data() -> Iterator[None]:
    """200 of the digits, and one classifier for every run inside this process."""
    digits = load_digits()
    few = Dataset(digits.samples[:200], digits.labels[:200], digits.classes)
    classifier = train_classifier(few, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsConfig, "load", lambda self: few)
        patch.setattr(DigitsConfig, "classifier", lambda self, data: classifier)
        yield


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert start(folder) == 0
    return folder
