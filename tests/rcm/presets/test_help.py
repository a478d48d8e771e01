"""The help of `python -m rcm.train` explains every option of every preset and method."""

import io
import re
from contextlib import redirect_stdout

import pytest

from rcm import train
from rcm.presets import DEFAULT_PRESET, PRESETS

# An option is followed by its text, which is indented further and ends with the default.
OPTION = re.compile(r"^  (--?\w.*)\n((?: {8}.*\n)*)", re.MULTILINE)
DEFAULT = re.compile(r"\((?:default: .*|required)\)", re.DOTALL)


def texts_of_options(*arguments: str) -> dict[str, str]:
    printed = io.StringIO()  # has no encoding, so that tyro draws no frames
    with redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        train.main([*arguments, "--help"])
    return {
        option.strip(): DEFAULT.sub("", text).strip()
        for option, text in OPTION.findall(printed.getvalue())
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_has_a_text(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    methods, shared = PRESETS[preset].methods, PRESETS[DEFAULT_PRESET].methods
    known = preset != DEFAULT_PRESET and methods is shared
    for method in [PRESETS[preset].default_method] if known else methods:
        texts = texts_of_options(preset, "--method", method)
        assert texts["--seed INT"] == "Seed of the weights, the data order and all noise."
        assert [option for option, text in texts.items() if not text] == [], method
