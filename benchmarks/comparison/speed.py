"""How long a training iteration of each method takes, in turns within one process."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import torch
from comparison.cost import config_of, evaluations, trainer_of
from comparison.studies import phases

ROUNDS = 15
ITERATIONS = 1000


def costs(preset: str, methods: Iterable[str]) -> dict[str, dict[str, float]]:
    """By method: median CPU seconds of an iteration in the last phase, and network evaluations.

    CPU time, of one thread, does not count what other processes take. The evaluations are the mean
    over a run.
    """
    torch.set_num_threads(1)
    trainers, evaluated = {}, {}
    for method in methods:
        options = ("--student.iterations", str(ITERATIONS), *phases(method, ITERATIONS))
        trainers[method] = trainer_of(config_of(preset, method, options))
        evaluated[method] = evaluations(preset, method, options) / ITERATIONS
    seconds: dict[str, list[float]] = {method: [] for method in trainers}
    for _ in range(ROUNDS):
        for method, trainer in trainers.items():
            trainer.iteration = ITERATIONS - 1  # every loss of the method is on
            start = time.process_time()
            trainer.step()
            seconds[method].append(time.process_time() - start)
    return {
        method: {"seconds": median(seconds[method][1:]), "evaluations": evaluated[method]}
        for method in trainers
    }
