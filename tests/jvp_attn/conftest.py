"""Runs the tests of derivatives with three backends: `cpu`, `tiled` and the emulated `cuda`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import jvp_attn
from jvp_attn.backends.cuda import CudaBackend
from tests.jvp_attn.emulated_backend import emulated_backend
from tests.jvp_attn.kernel_recorder import Recorder

# Test files whose tests run with each of the three, but for tests that take a backend themselves.
BY_ALL_BACKENDS = {
    "test_autograd",
    "test_derivatives",
    "test_func_transforms",
    "test_identities",
    "test_layouts",
    "test_mask_batch",
    "test_masked_keys",
    "test_masks",
    "test_random_cases",
    "test_varlen",
}
# Derivatives that launch hundreds of kernels: in the emulator they are slow.
SLOW = {"hessian_", "jacfwd_", "jacrev_", "jacrev_of_jacfwd", "jacrev_of_jacrev"}

# A file that was renamed would silently run with one backend only.
assert {path.stem for path in Path(__file__).parent.glob("test_*.py")} >= BY_ALL_BACKENDS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    if module in BY_ALL_BACKENDS and "backend" not in metafunc.fixturenames:
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
    """The backend that `flash_attn_jvp` uses during a test; without a parameter, the default."""
    name = getattr(request, "param", None)
    if name is None:
        yield
        return
    if name == "cpu" and "cpu" not in jvp_attn.available_backends():
        pytest.skip("the CPU extension is not built")
    with emulated_backend() if name == "emulated" else jvp_attn.backend(name):
        yield


@pytest.fixture
def recorder() -> Recorder:
    """Stands in for the CUDA extension and records the launches of `cuda`."""
    return Recorder()


@pytest.fixture
def cuda(recorder: Recorder) -> CudaBackend:
    """The CUDA backend, whose kernels are recorded and compute nothing."""
    return CudaBackend(recorder, recorder.stream_of)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile has compiled nothing before the test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
