"""What the libraries of models need before they can be imported."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def torchvision_of_another_build() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    Its builds on PyPI are for CUDA. Beside another torch its operators do not load; that would do
    no harm here, but it registers shapes for two of them, which must exist then.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
