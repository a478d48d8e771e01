"""Presets that train their own teacher."""

import math

import pytest

from rcm.models.dit import DiTConfig
from rcm.presets import PRESETS
from rcm.presets.methods import METHODS
from rcm.time_sampling import LogNormal
from rcm.training.config import FromScratchConfig


def config_of(preset: str, method: str) -> FromScratchConfig:
    config = PRESETS[preset].config(method)
    assert isinstance(config, FromScratchConfig) and isinstance(config.model, DiTConfig)
    return config


@pytest.mark.parametrize("preset", ["digits", "mnist-14", "mnist-28", "images"])
def test_presets_of_small_images_share_their_methods(preset: str) -> None:
    assert PRESETS[preset].methods is METHODS
    for method in METHODS:
        config = config_of(preset, method)
        assert config.student == METHODS[method]
        assert config.model.auxiliary_head == (method == "imeanflow")


@pytest.mark.parametrize(("preset", "side"), [("mnist-14", 14), ("mnist-28", 28)])
def test_images_of_mnist_have_49_tokens(preset: str, side: int) -> None:
    config = config_of(preset, "rcm")
    assert (side // config.model.patch) ** 2 == 49


@pytest.mark.parametrize(
    ("preset", "batch", "std"), [("cifar10", 512, 1.4), ("imagenet64", 2048, 1.6)]
)
@pytest.mark.parametrize("method", ["scm", "sct"])
def test_students_have_the_settings_of_the_paper(
    preset: str, batch: int, std: float, method: str
) -> None:
    """2410.11081, appendix G."""
    config = config_of(preset, method)
    student = config.student
    assert student.batch == config.teacher.batch == batch
    assert student.times == LogNormal(mean=-1.0, std=std, sigma_data=0.5)  # type: ignore[attr-defined]
    assert student.tangent_norm_eps == 0.1 and student.tangent_warmup == 10_000  # type: ignore[attr-defined]
    assert student.mid_times == (1.1,) and student.sigma_max == 160  # type: ignore[attr-defined]
    assert student.optimizer.betas == (0.9, 0.99) and student.optimizer.lr == 1e-4
    assert math.isinf(student.optimizer.clip)
