"""The studies of the comparison: each is a list of runs, which share teachers.

Every student of a study has the same budget in network evaluations (cost.py), so that methods whose
iterations cost more get fewer of them. Warm-ups and phases are fractions of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

from comparison.choices import (
    BEST_DIFFERENCE,
    CHOICE_SEED,
    CRITIC,
    MID_TIMES,
    RATE,
    REPORTED_NOISE,
    SCHEDULES,
    STEPS_OF_DIFFERENCES,
    rates_of,
)
from comparison.cost import config_of, evaluations
from comparison.run import Run

from rcm.methods.samplers import ConsistencyModel

SEEDS = {"digits": (0, 1, 2), "mnist-14": (0, 1)}
BUDGET = 6000.0  # network evaluations for each sample of a batch: 1200 iterations of scm or so
SHORT = 0.25  # fraction of the budget of runs that start from a student
SHORT_RATE, SHORT_CRITIC_RATE = 5e-5, 2e-4  # learning rates of those runs, whatever their method

METHODS = {
    "digits": (
        *("scm", "sct", "rcm", "rcm-staged", "dmd", "dcm", "lcm"),
        *("meanflow", "imeanflow", "ayf", "tvm"),
    ),
    "mnist-14": ("scm", "rcm", "dmd", "ayf", "meanflow"),
}
OTHER_RATES = {"mnist-14": {"scm": 1e-4, "rcm": 1e-4}}  # those of the digits are unstable there
DISCRETE_STEPS = (8, 32, 128, 1024, 4096)
SHIFT = math.log(5.0)  # a shift of rectified flow's time by 5 adds this to log σ


def phases(method: str, iterations: int) -> tuple[str, ...]:
    """Warm-ups and phases of a method as fractions of its iterations."""

    def option(name: str, fraction: float) -> tuple[str, str]:
        return f"--student.{name}", str(round(fraction * iterations))

    if method in ("scm", "sct"):
        return option("tangent-warmup", 1 / 2)
    if method == "rcm":
        return option("tangent-warmup", 1 / 2) + option("critic-start", 1 / 4)
    if method == "rcm-staged":
        stages = option("discrete-iterations", 1 / 6) + option("continuous-iterations", 1 / 2)
        return stages + option("critic-start", 1 / 2)
    if method in ("meanflow", "imeanflow", "ayf"):
        return option("tangent-warmup", 1 / 4)
    return ()


@cache
def within_budget(
    preset: str, method: str, options: tuple[str, ...] = (), budget: float = BUDGET
) -> tuple[str, ...]:
    """Iterations and phases of a run that costs the budget."""

    def of(iterations: int) -> tuple[str, ...]:
        return "--student.iterations", str(iterations), *phases(method, iterations)

    cost = evaluations(preset, method, of(1000) + options) / 1000
    return of(10 * round(budget / cost / 10)) + options


def teacher(preset: str, *model: str) -> Run:
    """A run for its teacher, with one iteration of a student."""
    name = "-".join(option.strip("-").replace(".", "-") for option in model) or "plain"
    options = ("--student.iterations", "1", *model)
    steps = ("--teacher-steps", "1", "2", "4", "8", "16", "32")
    return Run(
        name=f"teacher/{preset}/{name}/0",
        preset=preset,
        method="scm",
        seed=0,
        options=options,
        evaluation=(*steps, *REPORTED_NOISE),
    )


def student(
    study: str,
    preset: str,
    method: str,
    seed: int,
    *,
    what: str | None = None,
    rate: float | None = None,
    critic_rate: float | None = None,
    length: tuple[str, ...] | None = None,
    extra: tuple[str, ...] = (),
    architecture: tuple[str, ...] = (),
    start: Run | None = None,
) -> Run:
    """A run of a method, within the budget unless its length is given, at the rates of RATE and
    CRITIC unless others are given.

    architecture are options of the model that its teacher has too.
    """
    rate = RATE[method] if rate is None else rate
    rates = ("--student.optimizer.lr", f"{rate:g}")
    if method in CRITIC:
        critic_rate = rate * CRITIC[method] if critic_rate is None else critic_rate
        rates += ("--student.critic-optimizer.lr", f"{critic_rate:g}")
    length = within_budget(preset, method) if length is None else length
    return Run(
        name=f"{study}/{preset}/{what or method}/{seed}",
        preset=preset,
        method=method,
        seed=seed,
        options=(*length, *rates, *architecture, *extra),
        teacher=teacher(preset, *architecture),
        start=start,
        evaluation=() if seed == CHOICE_SEED else REPORTED_NOISE,
    )


def learning_rates() -> Iterator[Run]:
    """Every method at several learning rates, with the seed that chooses; also the mid times."""
    for method in METHODS["digits"]:
        has_mid_times = isinstance(config_of("digits", method).student, ConsistencyModel)
        evaluation = ("--mid-times", *MID_TIMES, *SCHEDULES) if has_mid_times else ()
        for rate in rates_of(method):
            run = student("learning-rates", "digits", method, CHOICE_SEED, rate=rate)
            name = chosen_name(method, rate)
            yield replace(run, name=name, evaluation=evaluation)


def chosen_name(method: str, rate: float) -> str:
    """The name of a run of the study `learning-rates`."""
    return f"learning-rates/digits/{method}-{rate:g}/{CHOICE_SEED}"


def methods(preset: str) -> Iterator[Run]:
    """Every method at its learning rate, and some at another one where that is unstable."""
    for seed in SEEDS[preset]:
        for method in METHODS[preset]:
            yield student("methods", preset, method, seed)
        for method, rate in OTHER_RATES.get(preset, {}).items():
            yield student("methods", preset, method, seed, what=f"{method}-{rate:g}", rate=rate)


def from_one_student() -> Iterator[Run]:
    """sCM alone, rCM with several λ, DMD alone, each from the scm student of its seed.

    All have the same learning rates, so that they differ in λ alone.
    """
    no_warmup, critic = ("--student.tangent-warmup", "0"), ("--student.critic-start", "0")
    shift = ("--student.score-times.mean", f"{SHIFT:.4g}")
    kinds = {
        "scm": ("scm", no_warmup),
        "dmd": ("dmd", critic),
        "dmd-shift": ("dmd", critic + shift),
        "rcm-1-shift": ("rcm", (*no_warmup, *critic, "--student.score-weight", "1", *shift)),
    }
    for weight in ("0.01", "0.1", "1"):
        options = (*no_warmup, *critic, "--student.score-weight", weight)
        kinds[f"rcm-{weight}"] = ("rcm", options)
    for seed in SEEDS["digits"]:
        for what, (method, extra) in kinds.items():
            yield student(
                "from-one-student",
                "digits",
                method,
                seed,
                what=what,
                rate=SHORT_RATE,
                critic_rate=SHORT_CRITIC_RATE,
                length=within_budget("digits", method, extra, SHORT * BUDGET),
                start=student("methods", "digits", "scm", seed),
            )


def scm(study: str, seed: int, what: str, *extra: str, architecture: tuple[str, ...] = ()) -> Run:
    """sCM with a change, for as many iterations as without it."""
    length = within_budget("digits", "scm")
    return student(
        study,
        "digits",
        "scm",
        seed,
        what=what,
        length=length,
        extra=extra,
        architecture=architecture,
    )


def differences() -> Iterator[Run]:
    """The exact tangent against central differences, in two precisions.

    Seed CHOICE_SEED tries all steps; others have the best one, and 1e-3 in bfloat16.
    """
    for precision, steps in STEPS_OF_DIFFERENCES.items():
        model = ("--model.precision", precision)
        for seed in (CHOICE_SEED, *SEEDS["digits"]):
            yield scm("differences", seed, f"{precision}-exact", *model)
            for step in steps if seed == CHOICE_SEED else {BEST_DIFFERENCE[precision], 1e-3}:
                difference = ("--student.difference-step", f"{step:g}")
                yield scm("differences", seed, f"{precision}-{step:g}", *model, *difference)


def ablations() -> Iterator[Run]:
    """What sCM's paper adds to a consistency model in continuous time, on and off."""
    double, fourier = ("--model.double-norm",), ("--model.time-embedding", "fourier")
    for seed in SEEDS["digits"]:
        # A large c divides the tangent by a constant, which makes no difference to Adam, but to
        # the clipping of gradients: without it too, the norm alone differs from "no-clip".
        no_clip = ("--student.optimizer.clip", "inf")
        constant = ("--student.tangent-norm-eps", "10")
        yield scm("ablations", seed, "no-clip", *no_clip)
        yield scm("ablations", seed, "no-tangent-norm", *constant, *no_clip)
        yield scm("ablations", seed, "no-warmup", "--student.tangent-warmup", "0")
        yield scm("ablations", seed, "learned-weight", "--model.learned-weight")
        yield scm("ablations", seed, "double-norm", architecture=double)
        yield scm("ablations", seed, "fourier", architecture=fourier)


def discrete() -> Iterator[Run]:
    """dCM with more and more steps of the teacher, beside sCM, in two precisions."""
    for seed in SEEDS["digits"][:2]:
        for precision in STEPS_OF_DIFFERENCES:
            model = ("--model.precision", precision)
            for steps in DISCRETE_STEPS:
                yield student(
                    "discrete",
                    "digits",
                    "dcm",
                    seed,
                    what=f"{precision}-{steps}",
                    extra=("--student.teacher-steps", str(steps), *model),
                )


STUDIES: dict[str, Callable[[], Iterator[Run]]] = {
    "learning-rates": learning_rates,
    "digits": lambda: methods("digits"),
    "from-one-student": from_one_student,
    "differences": differences,
    "ablations": ablations,
    "discrete": discrete,
    "mnist-14": lambda: methods("mnist-14"),
}
