"""A run so small that it takes seconds, shared by the tests of the commands."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rcm.commands.tiny_run import small_data, start


@pytest.fixture(scope="package", autouse=True)
def _small_data() -> Iterator[None]:
    with small_data():
        yield


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert start(folder) == 0
    return folder
