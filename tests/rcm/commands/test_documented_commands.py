"""The commands in docstrings and in docs/digits.md are valid."""

import re
from pathlib import Path

import pytest
import tyro

from rcm import sample, train

ROOT = Path(train.__file__).parents[1]
FILES = [*(ROOT / "rcm").rglob("*.py"), ROOT / "docs" / "digits.md"]
# A command ends at its comment, two spaces away, or at the end of the line.
COMMAND = re.compile(r"^ *python -m rcm\.(train|sample)\b(.*?)(?:  .*)?$", re.MULTILINE)
COMMANDS = [match.groups() for file in FILES for match in COMMAND.finditer(file.read_text())]


def test_commands_are_found() -> None:
    assert {name for name, _ in COMMANDS} == {"train", "sample"}


@pytest.mark.parametrize(("name", "options"), COMMANDS, ids=lambda text: text.strip() or "-")
def test_documented_command_is_valid(name: str, options: str) -> None:
    arguments = options.split()
    if name == "sample":
        tyro.cli(sample.Arguments, args=arguments)
    elif "--help" not in arguments:
        train.parse(arguments)
