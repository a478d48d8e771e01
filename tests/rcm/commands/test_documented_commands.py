"""The commands in docstrings, README.md and three pages of docs are valid."""

import re
from pathlib import Path

import pytest
import tyro

from rcm import evaluate, report, sample, train

ROOT = Path(train.__file__).parents[1]
PAGES = ["README.md", "docs/digits.md", "docs/data.md", "docs/scale.md"]
FILES = [*(ROOT / "rcm").rglob("*.py"), *(ROOT / page for page in PAGES)]
# A command may follow a title such as "8 GPUs". It ends at its comment, two spaces away, or at the
# end of the line, which a backslash continues.
COMMAND = re.compile(
    r"^ *(?:\d \w+ +)?(?:python|torchrun .*?) -m rcm\.(train|sample|evaluate|report)\b"
    r"(.*?)(?:  .*)?$",
    re.MULTILINE,
)
# The commands whose arguments are one dataclass.
COMPLETE: dict[str, type] = {
    "sample": sample.Arguments,
    "evaluate": evaluate.Arguments,
    "report": report.Arguments,
}
CONTINUATION = re.compile(r" *\\+\n *")
COMMANDS = [
    match.groups()
    for file in FILES
    for match in COMMAND.finditer(CONTINUATION.sub(" ", file.read_text()))
]


def test_commands_are_found() -> None:
    assert {name for name, _ in COMMANDS} == {"train", *COMPLETE}
    options = [options for name, options in COMMANDS if name == "train"]
    assert sum("--mesh.ulysses 8 --accumulation 8" in line for line in options) == 2


@pytest.mark.parametrize(("name", "options"), COMMANDS, ids=lambda text: text.strip() or "-")
def test_documented_command_is_valid(name: str, options: str) -> None:
    arguments = [argument for argument in options.split() if argument != "..."]
    if name in COMPLETE:
        tyro.cli(COMPLETE[name], args=arguments)
    elif "--help" not in arguments:
        train.parse(arguments)
