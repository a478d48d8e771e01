"""Settings of methods act: the guidance, the target, the velocity and the derivative."""

from dataclasses import fields
from typing import Any

import pytest

from rcm.guidance import Guidance
from tests.rcm.methods.digits_methods import METHODS, digits_config, digits_trainer

GUIDED = Guidance(scale=3.0)
UNGUIDED = {"sct", "tvm"}


def losses(method: str, **settings: Any) -> list[float]:
    """The losses of the student in three iterations; the last two have the full tangent."""
    trainer = digits_trainer(method, 3, **settings)
    return [trainer.step()["loss"] for _ in range(3)]


def methods_with(setting: str) -> list[str]:
    configs = {method: digits_config(method, 4).student for method in METHODS}
    return [m for m, student in configs.items() if setting in {f.name for f in fields(student)}]


@pytest.mark.parametrize("method", sorted(UNGUIDED))
def test_a_method_without_a_teacher_refuses_guidance(method: str) -> None:
    with pytest.raises(ValueError, match="guidance is active; it must have scale 1"):
        digits_config(method, 4, guidance=GUIDED)


def test_a_mean_flow_of_data_refuses_guidance() -> None:
    with pytest.raises(ValueError, match="data and noise has none"):
        digits_config("meanflow", 4, velocity="data", guidance=GUIDED)


@pytest.mark.parametrize("method", sorted(set(METHODS) - UNGUIDED))
def test_guidance_changes_what_the_student_learns(method: str) -> None:
    assert losses(method, guidance=GUIDED) != losses(method, guidance=Guidance())


@pytest.mark.parametrize("method", methods_with("difference_step"))
def test_a_central_difference_gives_nearly_the_losses_of_the_exact_derivative(method: str) -> None:
    exact, difference = losses(method), losses(method, difference_step=0.01)
    assert difference != exact
    assert difference == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("method", methods_with("passes"))
def test_one_pass_is_the_default_and_gives_the_losses_of_two(method: str) -> None:
    one, two = losses(method), losses(method, passes="two")
    assert losses(method, passes="one") == one
    assert one == pytest.approx(two, rel=1e-5)


def test_one_pass_is_refused_where_the_derivative_has_two_or_has_gradients() -> None:
    with pytest.raises(ValueError, match=r"passes is 'one', but a central difference"):
        digits_config("scm", 4, passes="one", difference_step=0.01)
    with pytest.raises(ValueError, match=r"passes is 'one'; it must be left out"):
        digits_config("ayf", 4, passes="one", objective="unstopped-lmd")
    with pytest.raises(ValueError, match=r"passes is 'three'; it must be one of one, two"):
        digits_config("scm", 4, passes="three")


def test_the_three_objectives_of_ayf_differ() -> None:
    found = {tuple(losses("ayf", objective=o)) for o in ("emd", "lmd", "unstopped-lmd")}
    assert len(found) == 3


@pytest.mark.parametrize("method", ["meanflow", "imeanflow"])
def test_a_mean_flow_is_distilled_or_trained_on_data(method: str) -> None:
    assert losses(method, velocity="teacher") != losses(method, velocity="data")
    assert "teacher" in digits_config(method, 4, velocity="teacher").student.roles()
    assert "teacher" not in digits_config(method, 4, velocity="data").student.roles()


def test_the_target_of_dcm_is_the_student_or_its_average() -> None:
    student = losses("dcm")
    assert losses("dcm", target_decay=0.0) == student
    average = losses("dcm", target_decay=0.9)
    assert average[:1] == student[:1]  # before the first update they are equal
    assert average[1:] != student[1:]
