"""Tests of derivatives run thrice: by the backends `cpu`, `tiled` and `cuda`, emulated."""

from collections.abc import Iterator

import pytest

import jvp_attn
from tests.jvp_attn.emulated_backend import emulated_backend

BY_ALL_BACKENDS = {
    "test_attention_autograd",
    "test_attention_derivatives",
    "test_attention_func_transforms",
    "test_attention_hidden_keys",
    "test_attention_identities",
    "test_attention_layouts",
    "test_attention_masks",
    "test_attention_random_cases",
    "test_attention_varlen",
}
# Derivatives that take hundreds of launches.
SLOW = {"hessian_", "jacfwd_", "jacrev_", "jacrev_of_jacfwd", "jacrev_of_jacrev"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chooses_backends_itself = "backend" in metafunc.fixturenames
    if metafunc.module.__name__ in BY_ALL_BACKENDS and not chooses_backends_itself:
        metafunc.parametrize("computed_by", ["cpu", "tiled", "emulated"], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        derivative = getattr(parameters.get("derivative"), "__name__", "")
        if parameters.get("computed_by") == "emulated" and derivative in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def computed_by(request: pytest.FixtureRequest) -> Iterator[None]:
    """The backend of `flash_attn_jvp` during a test."""
    name = getattr(request, "param", None)
    if name is None:  # as users have it
        yield
        return
    if name == "cpu" and "cpu" not in jvp_attn.available_backends():
        pytest.skip("the CPU extension is not built")
    with emulated_backend() if name == "emulated" else jvp_attn.backend(name):
        yield
