"""Tests marked `cuda` run where there is an NVIDIA GPU; elsewhere one line says they did not."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch finds no NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("cuda" in report.keywords for report in skipped)
    if count and not torch.cuda.is_available():
        terminalreporter.write_line(f"torch finds no NVIDIA GPU: skipped {count} tests marked cuda")
