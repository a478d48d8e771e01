"""What a run notes of its data, compared with the data it finds later."""

from dataclasses import replace

import pytest

from rcm.data.dataset import OF_NETWORKS, DataFacts, require_same_facts
from rcm.errors import RunError

NOTED = DataFacts(
    sample_shape=(1, 8, 8), classes=2, samples=16, black=-0.4, white=2.8, class_names=("a", "b")
)


def compare(found: DataFacts, **options: tuple[str, ...]) -> None:
    require_same_facts(NOTED, found, origin="r was trained on", remedy="restore them", **options)


def test_a_mean_may_be_rounded_differently() -> None:
    compare(replace(NOTED, black=-0.4 * (1 + 5e-6), white=2.8 * (1 - 5e-6)))
    with pytest.raises(RunError, match="their white changed; restore them"):
        compare(replace(NOTED, white=2.8 * (1 - 5e-5)))


def test_the_message_names_all_that_changed() -> None:
    found = replace(NOTED, samples=17, class_names=("b", "a"))
    with pytest.raises(RunError, match="r was trained on: their samples and class_names changed"):
        compare(found)
    with pytest.raises(RunError, match=": their class_names changed"):
        compare(found, names=OF_NETWORKS)


def test_networks_do_not_depend_on_the_number_of_samples() -> None:
    compare(replace(NOTED, samples=17, black=0.0), names=OF_NETWORKS)
