"""Parse the options of a command with tyro; report an invalid one in a single line."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import TypeVar

import tyro

from rcm.errors import OptionError

T = TypeVar("T")

OPTION_CODE = 2  # exit code after an invalid option

# Of tyro: the title and frame of a message (without UTF-8 a line below the title), the line that
# ends the message, and the suggestion below that line.
COLOR = re.compile(r"\x1b\[[\d;]*m")
TITLE = re.compile(r"╭.*\n|.*\n\s*-+\s*\n")
FRAME = re.compile(r"[│╰╯]")
RULE = re.compile(r"^\s*[─-]{3,}\s*$", re.MULTILINE)
SUGGESTION = re.compile(r"Perhaps you meant:\s+(--[\w.-]+)")

# Of tyro and of dataclasses: which option is meant. `Arguments` is the dataclass of a command and
# `config` its field with the settings; options leave both out.
OPTION = re.compile(r"Error parsing (--[\w.-]+): (.*)")
SETTING = re.compile(
    r"(?:Error parsing (?:(?:\w*Arguments|config)\b\.?)?(?P<group>[\w.-]*): )?"
    r"(?P<name>[\w.]+(?:\[\d\])?) (?P<problem>is .*)"
)
NOT_A_NUMBER = {
    "invalid literal for int() with base 10: ": "an integer",
    "could not convert string to float: ": "a number",
}


def parse(arguments: type[T], *, prog: str, args: list[str], default: T | None = None) -> T:
    """The arguments of a command, as an instance of their dataclass.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
        SystemExit: help was requested.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            if default is None:
                parsed = tyro.cli(arguments, prog=prog, args=args)
            else:
                parsed = tyro.cli(arguments, prog=prog, args=args, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise OptionError(_one_line(printed.getvalue())) from None
    except (ValueError, TypeError) as error:  # of the outermost settings, which tyro passes on
        raise OptionError(_option_message(str(error))) from error
    sys.stderr.write(printed.getvalue())  # warnings
    return parsed


def require_writable(out: Path) -> None:
    """Raise OptionError unless the file of --out can be written."""
    if out.is_dir():
        raise OptionError(f"--out is {out}; it must be a file, not a folder")
    if not out.parent.is_dir():
        raise OptionError(f"--out is {out}; its folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OptionError(f"--out is {out}; its folder {out.parent} cannot be written")


def report(error: Exception) -> int:
    """Print the one line about an error; return the exit code of the command."""
    print(f"error: {error}", file=sys.stderr)
    return OPTION_CODE if isinstance(error, OptionError) else 1


def _one_line(framed: str) -> str:
    """The message in a frame that tyro printed."""
    text = FRAME.sub("", TITLE.sub("", COLOR.sub("", framed), count=1))
    message, *rest = RULE.split(text)
    message = _option_message(" ".join(message.split()))
    suggestion = SUGGESTION.search(" ".join(" ".join(rest).split()))
    return f"{message}; perhaps you meant {suggestion[1]}" if suggestion else message


def _option_message(message: str) -> str:
    """A message about a setting, such as "heads is 3; ...", with the name of its option."""
    if match := OPTION.fullmatch(message):
        option, problem = match.groups()
        for start, kind in NOT_A_NUMBER.items():
            if problem.startswith(start):
                return f"{option} is {problem.removeprefix(start)}; it must be {kind}"
        return f"{option}: {problem}"
    if match := SETTING.fullmatch(message):
        name = ".".join(filter(None, (match["group"], match["name"])))
        return f"--{name.replace('_', '-')} {match['problem']}"
    return message
