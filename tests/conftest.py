"""What all tests share: a marker for each folder, and the option --exhaustive."""

import sys
from pathlib import Path

import pytest

from tests.kernels import exhaustive

HERE = Path(__file__).resolve().parent
MARKERS = {
    "distributed": "distributed",
    "emulator": "emulator",
    "gpu": "emulator",
    "kernels": "kernels",
    "models": "models",
    "package": "packaging",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="select all tests marked exhaustive, even if they have passed with these kernels",
    )


def pytest_report_header() -> str:
    return f"tests marked exhaustive: {exhaustive.status()}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])


def pytest_unconfigure() -> None:
    """A backward pass that works. If the last one failed, PyTorch 2.15 may crash at exit."""
    if torch := sys.modules.get("torch"):
        torch.ones((), requires_grad=True).backward()
