"""The examples of docs/distillation.md run: a loss alone, and a method of one's own."""

import importlib
import re
from pathlib import Path

import pytest

import rcm
from rcm import sample
from rcm.presets import methods
from tests.rcm.commands.tiny_run import metrics, start_method

pytestmark = pytest.mark.xdist_group("train")

PAGE = (Path(rcm.__file__).parents[1] / "docs" / "distillation.md").read_text()
LOSS, METHOD, SETTINGS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_losses_need_no_trainer() -> None:
    names: dict = {}
    exec(LOSS, names)
    assert names["exact"].value.shape == (8,)
    assert names["approximate"].value.allclose(names["exact"].value, atol=1e-3)


def test_a_method_of_ones_own_trains_and_samples(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "regression.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("regression")
    added = dict(methods.METHODS)
    exec(SETTINGS, {**vars(methods), **vars(module), "METHODS": added})
    monkeypatch.setitem(methods.METHODS, "regression", added["regression"])

    folder = tmp_path / "run"
    option = ("--student.teacher-steps", "4")
    assert start_method(folder, "regression", finished, *option) == 0
    assert len([line for line in metrics(folder) if "loss" in line]) == 10
    assert sample.main([str(folder), "--out", str(tmp_path / "grid.png")]) == 0
