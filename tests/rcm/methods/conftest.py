"""A teacher that the runs of all methods share."""

from pathlib import Path

import pytest

from tests.rcm.commands.conftest import _small_data  # noqa: F401 (an automatic fixture)
from tests.rcm.methods.digits_methods import save_teacher_run


@pytest.fixture(scope="package")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher_run(folder)
    return folder
