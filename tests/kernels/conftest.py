"""Selects all exhaustive tests, or a sample of them; see exhaustive.py."""

import pytest

from tests.kernels.exhaustive import in_sample, is_current, tree_hash


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
    for item in exhaustive:
        item.add_marker(pytest.mark.slow)
    if not exhaustive or config.getoption("exhaustive") or not is_current():
        return
    tree = tree_hash()
    left_out = {item for item in exhaustive if not in_sample(item.nodeid, tree)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
