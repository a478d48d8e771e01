"""How many real samples can be scored: exactly those that `require_enough` lets pass."""

import pytest
import torch

from rcm.data.dataset import Dataset
from rcm.errors import RunError
from rcm.evaluation.enough import require_enough
from rcm.evaluation.evaluator import Evaluator
from tests.rcm.evaluation.samplers import SETTINGS, FirstElement, OneTime


@pytest.mark.parametrize("labels", ["0", "0000000", "00000000", "01234567", "0011223", "00112233"])
@pytest.mark.parametrize("order", ["", "0101", "00001111"])
def test_it_lets_pass_what_can_be_scored(labels: str, order: str) -> None:
    numbers = torch.tensor(list(map(int, labels + order)))
    data = Dataset(torch.randn(len(numbers), 1, 2, 2), numbers, classes=8)
    try:
        Evaluator(data, FirstElement(), OneTime(**SETTINGS)).real_row()
    except RunError:
        with pytest.raises(RunError, match=f"the {len(data)} real samples .*That takes patience"):
            require_enough(data, remedy="patience")
    else:
        require_enough(data, remedy="")
