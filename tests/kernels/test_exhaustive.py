"""All exhaustive tests run when the kernels have changed; otherwise a sample of them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.kernels import exhaustive
from tests.kernels.exhaustive import HASHED, RECORD, ROOT, tree_hash


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small copy of the files that are hashed, with a current record."""
    for path in HASHED:
        file = tmp_path / path if path.endswith(".py") else tmp_path / path / "file.h"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"one line\nanother\n")
    write_record(tmp_path, tree_hash(tmp_path))
    return tmp_path


def write_record(root: Path, tree: str) -> None:
    (root / RECORD).write_text(json.dumps({"tree": tree, "date": "2026-01-31", "tests": 5}))


def test_the_record_of_this_tree_is_well_formed() -> None:
    exhaustive.read_record()


@pytest.mark.parametrize("field", [{"tree": "12"}, {"date": "May"}, {"tests": 0}, {"more": 1}])
def test_a_malformed_record_raises(tree: Path, field: dict[str, str | int]) -> None:
    record = json.loads((tree / RECORD).read_text())
    (tree / RECORD).write_text(json.dumps(record | field))
    with pytest.raises((TypeError, ValueError)):
        exhaustive.read_record(tree)


def test_a_record_is_current_until_a_hashed_file_changes(tree: Path) -> None:
    assert exhaustive.is_current(tree)
    assert exhaustive.status(tree).startswith("1 in ")
    for path in HASHED:
        new = tree / path if path.endswith(".py") else tree / path / "deep" / "new.h"
        new.parent.mkdir(exist_ok=True)
        before = new.read_bytes() if new.exists() else None
        new.write_bytes(b"new\n")
        assert not exhaustive.is_current(tree)
        assert "all of them, since the kernels" in exhaustive.status(tree)
        new.unlink() if before is None else new.write_bytes(before)
        assert exhaustive.is_current(tree)
    (tree / RECORD).unlink()
    assert not exhaustive.is_current(tree)
    assert "no record" in exhaustive.status(tree)


def test_other_files_and_line_endings_do_not_change_the_hash(tree: Path) -> None:
    before = tree_hash(tree)
    (tree / "csrc" / "file.h").write_bytes(b"one line\r\nanother\r\n")
    (tree / "csrc" / "__pycache__").mkdir()
    (tree / "csrc" / "__pycache__" / "file.pyc").write_bytes(b"compiled")
    (tree / "tests" / "other.py").write_bytes(b"other")
    assert tree_hash(tree) == before


def test_a_sample_is_small_and_differs_from_tree_to_tree() -> None:
    tests = [f"test[{i}]" for i in range(1600)]
    samples = [{x for x in tests if exhaustive.in_sample(x, tree)} for tree in ("a", "a", "b")]
    assert samples[0] == samples[1]
    assert 50 < len(samples[0]) < 160
    assert len(samples[0] & samples[2]) < 30


def selected(root: Path, *options: str) -> int:
    """How many of 400 exhaustive tests pytest selects in a tree."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    listing = subprocess.run(
        [*command, *options], cwd=root, env=environment, capture_output=True, text=True
    )
    assert listing.returncode in (0, 5), listing.stdout + listing.stderr
    return listing.stdout.count("::test_some[")


def test_pytest_selects_a_sample_or_all(tree: Path) -> None:
    kernels = tree / "tests" / "kernels"
    for path in ("tests/conftest.py", "tests/kernels/conftest.py", "tests/kernels/exhaustive.py"):
        (tree / path).write_bytes((ROOT / path).read_bytes())
    for package in (kernels, kernels.parent):
        (package / "__init__.py").touch()
    (tree / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (kernels / "test_some.py").write_text(
        "import pytest\n\n\n@pytest.mark.exhaustive\n"
        "@pytest.mark.parametrize('x', range(400))\ndef test_some(x): ...\n"
    )
    write_record(tree, tree_hash(tree))
    assert selected(tree) == 0
    assert 0 < selected(tree, "-m", "slow") < 60
    assert selected(tree, "-m", "exhaustive", "--exhaustive") == 400
    (tree / "csrc" / "file.h").write_text("changed")
    assert selected(tree, "-m", "slow") == 400


@pytest.mark.parametrize("outcomes", [["passed"] * 3, ["passed", "skipped"], ["passed", "failed"]])
def test_a_record_is_written_when_all_tests_pass(
    tree: Path, outcomes: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: Sequence[str], plugins: Sequence[exhaustive.Counter]) -> int:
        assert {"exhaustive", "--exhaustive"} <= set(options)
        for outcome in outcomes:
            report = {x: x == outcome for x in ("passed", "skipped")}
            plugins[0].pytest_runtest_logreport(SimpleNamespace(when="call", **report))
        return int("failed" in outcomes)

    (tree / RECORD).unlink()
    monkeypatch.setattr(pytest, "main", run)
    assert (exhaustive.main(tree) == 0) == (set(outcomes) == {"passed"})
    record = exhaustive.read_record(tree)
    assert (record and record.tests) == (3 if set(outcomes) == {"passed"} else None)


def test_no_record_is_written_when_files_change_during_the_run(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: Sequence[str], plugins: Sequence[object]) -> int:
        (tree / "csrc" / "file.h").write_text("changed")
        return 0

    monkeypatch.setattr(pytest, "main", run)
    assert exhaustive.main(tree) == 1
    assert not exhaustive.is_current(tree)
