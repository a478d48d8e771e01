"""When a student counts as collapsed, and which norm is named as the first that moved."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from rcm.distributed.layout import Layout
from rcm.errors import RunError
from rcm.training.collapse import TOLERANCE, CollapseWatch, OnCollapse, first_moved

EVERY = 5


def watch(
    relative_rmse: list[float], teacher_rmse: float = 0.0, on_collapse: OnCollapse = "stop"
) -> CollapseWatch:
    """A watch whose probes measure these values, one after another; all but the first one are
    divided by the tolerance.
    """
    first, *others = relative_rmse
    values = iter([first, *(TOLERANCE * rmse for rmse in others)])

    def measure(student: object, check_jvp: bool) -> dict[str, float]:
        return {"probe_rmse": next(values), "checked": float(check_jvp)}

    return CollapseWatch(measure, teacher_rmse, every=EVERY, on_collapse=on_collapse)


def trainer(iteration: int) -> Any:
    return SimpleNamespace(iteration=iteration, network=None, layout=Layout())


def collapsed_after_each_probe(watched: CollapseWatch, probes: int) -> list[bool]:
    collapsed = []
    for number in range(probes):
        watched.probe(trainer(number * EVERY))
        collapsed.append(watched.collapsed)
    return collapsed


def test_three_probes_in_a_row_above_the_limit_are_a_collapse() -> None:
    rmse = [0.5, 0.6, 0.6, 0.4, 0.6, 0.6, 0.51, 0.4]
    expected = [False, False, False, False, False, False, True, False]
    assert collapsed_after_each_probe(watch(rmse), len(rmse)) == expected


def test_a_student_may_move_as_far_away_as_the_teacher_in_one_step() -> None:
    """DMD moves a good student away from the teacher's samples."""
    rmse = [0.2, 0.3, 0.4, 0.5, 0.4]
    assert any(collapsed_after_each_probe(watch(rmse), len(rmse)))
    assert not any(collapsed_after_each_probe(watch(rmse, teacher_rmse=0.5), len(rmse)))


def test_all_ranks_decide_by_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank alone would see a collapse; another one is as far below the limit."""
    monkeypatch.setattr(Layout, "mean", lambda self, values: values - 0.1)
    watched = watch([0.5, 0.55, 0.55, 0.55])
    assert watched.probe(trainer(0))["probe_rmse"] == pytest.approx(0.4)
    watched.limit = 0.75
    assert not any(collapsed_after_each_probe(watched, 3))


def test_the_limit_is_reported_once() -> None:
    watched = watch([0.2, 0.3], teacher_rmse=0.5)
    assert watched.probe(trainer(0))["probe_rmse_limit"] == 0.5 * TOLERANCE
    assert "probe_rmse_limit" not in watched.probe(trainer(EVERY))


def test_a_restored_watch_continues_to_count() -> None:
    first, second = watch([0.5, 0.6, 0.6]), watch([TOLERANCE * 0.6])
    assert not any(collapsed_after_each_probe(first, 3))
    second.load_state_dict(first.state_dict())
    second.probe(trainer(3 * EVERY))
    assert second.collapsed


def test_checkpoints_wait_until_the_last_probe_was_good() -> None:
    rmse = [0.5, 0.6, 0.4]
    for on_collapse, expected in (("stop", [True, False, True]), ("continue", [True] * 3)):
        watched = watch(rmse, on_collapse=on_collapse)  # type: ignore[arg-type]
        allowed = []
        for number in range(3):
            watched.probe(trainer(number * EVERY))
            allowed.append(watched.allows_checkpoint)
        assert allowed == expected


def test_the_jvp_is_checked_by_every_tenth_probe() -> None:
    watched = watch([0.5] * 21)
    checked = [watched.probe(trainer(number * EVERY))["checked"] for number in range(21)]
    assert [number for number, check in enumerate(checked) if check] == [0, 10, 20]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_stop_the_run(value: float) -> None:
    watched = watch([0.5, value])
    watched.probe(trainer(0))
    with pytest.raises(RunError, match="iteration 5: samples of the student are not finite"):
        watched.probe(trainer(5))


def lines(**norms: list[float]) -> list[dict[str, Any]]:
    """Lines of iterations 1, 2, ..., and one of a probe."""
    rows = zip(*norms.values(), strict=True)
    steps = [
        {"iteration": i + 1, **dict(zip(norms, row, strict=True))} for i, row in enumerate(rows)
    ]
    return [*steps[:15], {"iteration": 15, "probe_rmse": 0.4}, *steps[15:]]


def test_the_earliest_norm_is_named_with_its_values() -> None:
    moved = first_moved(
        lines(
            loss=[1.0] * 40,
            grad_norm=[2.0] * 30 + [7.0] * 10,
            tangent_norm=[1.0] * 24 + [4.0, 5.0] * 8,
        ),
        healthy=20,
    )
    assert moved is not None
    assert (moved.name, moved.iteration, moved.value, moved.median) == ("tangent_norm", 25, 4, 1)
    assert "tangent_norm: in iteration 25 it was 4, and 1 in the median before" in str(moved)


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 40,
        [1.0] * 20 + [9.0, 9.0, 1.0] * 5,  # never three in a row
        [1.0] * 20 + [3.0] * 20,  # not above three times the median
        [0.01] * 3 + [1.0] * 37,  # the first iterations are no measure
        [-1.0] * 20 + [-0.5] * 20,
    ],
)
def test_norms_that_stay_in_their_usual_range_have_not_moved(values: list[float]) -> None:
    assert first_moved(lines(jvp_norm=values), healthy=20) is None


def test_iterations_of_the_collapse_are_no_measure() -> None:
    """Else a norm that rises slowly would never leave its usual range."""
    values = [1.0] * 20 + [1.02**i for i in range(60)]
    moved = first_moved(lines(velocity_error=values), healthy=20)
    assert moved is not None
    assert moved.median == 1
    assert first_moved(lines(velocity_error=values), healthy=80) is None


def test_the_explanation_says_what_happened_and_what_to_do() -> None:
    watched = watch([0.5, 0.4, 0.4, 0.6, 0.7, 0.8])
    collapsed_after_each_probe(watched, 6)
    probes = [
        {"iteration": i * EVERY, "probe_rmse": rmse}
        for i, rmse in enumerate([0.5, 0.4, 0.4, 0.6, 0.7, 0.8])
    ]
    text = watched.explain(25, [*lines(loss=[1.0] * 25), *probes])
    assert text.startswith("iteration 25: the student collapsed.")
    assert (
        "exceeded 0.75, 1.5 times its starting value, in 3 probes in a row since iteration 15, "
        "the last 0.6, 0.7, 0.8." in text
    )
    assert "None of tangent_norm, jvp_norm" in text
    for advice in ("--student.optimizer.lr", "tangent warm-up", "--on-collapse continue"):
        assert advice in text
    text = watched.explain(25, [*lines(loss=[1.0] * 12 + [9.0] * 13), *probes])
    assert "The first norm to move was loss: in iteration 13 it was 9, and 1" in text


def test_an_early_collapse_is_not_explained_by_a_norm() -> None:
    watched = watch([0.5, 0.6, 0.6, 0.6])
    collapsed_after_each_probe(watched, 4)
    probes = [{"iteration": i * EVERY, "probe_rmse": 0.6} for i in range(4)]
    assert "too early to say which norm" in watched.explain(15, probes)
