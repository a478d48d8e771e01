"""The plan of the comparison: equal budgets, names, and what runs need of each other."""

import math
from dataclasses import replace

import pytest
from comparison import cost, studies
from comparison.choices import CHOICE_SEED
from comparison.cost import config_of, evaluations
from comparison.run import Run
from comparison.studies import BUDGET, METHODS, SEEDS, STUDIES, within_budget

from rcm.presets import PRESETS
from rcm.train import parse


@pytest.fixture(scope="module")
def cheap_plan() -> dict[str, list[Run]]:
    """All runs, as if every iteration cost the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "evaluations", lambda preset, method, options: 5000.0)
        within_budget.cache_clear()
        plan = {name: list(study()) for name, study in STUDIES.items()}
    within_budget.cache_clear()
    return plan


def test_a_run_within_the_budget_costs_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cost of an iteration depends on the phase."""
    monkeypatch.setattr(cost, "POINTS", 8)  # as precise, for a phase is a multiple of a quarter
    options = within_budget("digits", "rcm")
    assert evaluations("digits", "rcm", options) == pytest.approx(BUDGET, rel=0.04)


def test_evaluations_count_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flow matching of a student: one forward pass and a backward pass of about two."""
    monkeypatch.setattr(cost, "POINTS", 4)  # all iterations of these cost the same
    options = ("--student.iterations", "10")
    per_iteration = {m: evaluations("digits", m, options) / 10 for m in ("scm", "sct", "dcm")}
    assert per_iteration["scm"] - per_iteration["sct"] == pytest.approx(1, abs=0.01)  # the teacher
    assert per_iteration["sct"] == pytest.approx(4, abs=0.3)  # with a JVP of two, and a backward
    # Two evaluations of Heun's method, one of the target, one with a backward pass of two.
    assert per_iteration["dcm"] == pytest.approx(6, abs=0.3)


def test_every_run_has_its_own_name_and_valid_settings(cheap_plan: dict[str, list[Run]]) -> None:
    runs = [run for study in cheap_plan.values() for run in study]
    assert len({run.name for run in runs}) == len(runs)
    # Of the runs that differ in values alone, one.
    kinds = {(run.method, tuple(o for o in run.options if o.startswith("--"))): run for run in runs}
    for run in kinds.values():
        config = config_of(run.preset, run.method, run.options)
        assert config.student.iterations == run.iterations > 0
        assert run.teacher is not None
        taught = config_of(run.teacher.preset, run.teacher.method, run.teacher.options)
        assert config.model.differences(taught.model) == []


def test_every_method_is_compared_and_the_choice_seed_is_not_reported(
    cheap_plan: dict[str, list[Run]],
) -> None:
    assert set(METHODS["digits"]) == set(PRESETS["digits"].methods)
    assert all(CHOICE_SEED not in seeds for seeds in SEEDS.values())
    for preset, count in (("digits", 33), ("mnist-14", 14)):
        compared = cheap_plan[preset]
        assert len(compared) == count
        assert {run.method for run in compared} == set(METHODS[preset])
    assert {run.seed for run in cheap_plan["learning-rates"]} == {CHOICE_SEED}
    # Of the noise of its samples too: --seed 0 is the default of rcm.evaluate.
    for run in (run for study in cheap_plan.values() for run in study):
        assert ("--seed" in run.evaluation) == (run.seed != CHOICE_SEED)
        assert run.teacher is not None and run.teacher.evaluation[-2:] == ("--seed", "1")


def test_runs_from_one_student_start_from_that_of_their_seed(
    cheap_plan: dict[str, list[Run]],
) -> None:
    compared = {run.name: run for run in cheap_plan["digits"]}
    for run in cheap_plan["from-one-student"]:
        assert run.start is not None
        assert run.start == compared[run.start.name]
        assert run.start.seed == run.seed
        assert run.start in run.needs


def test_runs_from_one_student_have_the_same_learning_rates(
    cheap_plan: dict[str, list[Run]],
) -> None:
    runs = {run.what: run for run in cheap_plan["from-one-student"]}
    for run in runs.values():
        student = config_of(run.preset, run.method, run.options).student
        assert student.optimizer.lr == 5e-5
        if run.method != "scm":
            assert student.critic_optimizer.lr == 2e-4  # type: ignore[attr-defined]


def test_the_run_without_tangent_norm_differs_in_the_norm_alone_from_that_without_clipping(
    cheap_plan: dict[str, list[Run]],
) -> None:
    runs = {run.what: run for run in cheap_plan["ablations"] if run.seed == 0}
    plain, unclipped = runs["no-tangent-norm"], runs["no-clip"]
    students = [config_of(r.preset, r.method, r.options).student for r in (plain, unclipped)]
    assert [s.tangent_norm_eps for s in students] == [10, 0.1]  # type: ignore[attr-defined]
    assert [s.optimizer.clip for s in students] == [math.inf, math.inf]
    assert replace(students[0], tangent_norm_eps=0.1) == students[1]  # type: ignore[call-arg]


def test_the_precision_of_a_run_is_that_of_its_name(cheap_plan: dict[str, list[Run]]) -> None:
    for study in ("differences", "discrete"):
        for run in cheap_plan[study][::7]:
            arguments = parse([run.preset, "--method", run.method, *run.options])
            precision = run.name.split("/")[2].split("-")[0]
            assert arguments.config.model.precision == precision  # type: ignore[union-attr]
