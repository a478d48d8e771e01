"""Micro-batches add up to the batch."""

from collections.abc import Iterator

import pytest
import torch

from tests.rcm.methods.digits_methods import digits_trainer


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", ["rcm", "meanflow", "tvm"])
def test_micro_batches_give_the_metrics_and_weights_of_the_batch(method: str) -> None:
    whole, parts = (digits_trainer(method, 6, accumulation=n) for n in (1, 4))
    for _ in range(6):
        expected, found = whole.step(), parts.step()
        # Gradients of single losses are compared in whole batches alone.
        assert {n for n in expected if n not in found} == {
            n for n in expected if n.startswith(("grad_norm_", "grad_ratio_"))
        }
        assert found == pytest.approx({n: expected[n] for n in found}, rel=1e-9, abs=1e-14)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], weight, rtol=1e-9, atol=1e-12)
