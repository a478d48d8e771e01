"""Every method on the digits, from one teacher, in short runs: benchmarks/results/methods.json.

    python benchmarks/methods.py [--methods scm ayf ...] [--seeds 0 1 2] [--runs FOLDER]

Runs `python -m rcm.train` for each method and seed, and once for the teacher. Finished runs are not
repeated, and an interrupted one is continued: repeat the command. The exit status is 1 if a run
misses one of the floors below.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import environment

# Iterations of batch 32 at learning rate 2e-4. DMD starts from the scm student of the same seed, at
# half this rate: at 2e-4 one of the seeds collapses.
ITERATIONS = {
    "scm": 800,
    "sct": 600,
    "rcm": 800,
    "rcm-staged": 800,
    "dmd": 300,
    "dcm": 600,
    "lcm": 600,
    "meanflow": 600,
    "imeanflow": 600,
    "ayf": 600,
    "tvm": 600,
}
WARMUP = {"scm": 400, "sct": 300, "rcm": 400, "meanflow": 150, "ayf": 150}
EXTRA = {
    "dmd": ["--student.optimizer.lr", "1e-4", "--student.critic-optimizer.lr", "1e-4"],
    "rcm": ["--student.critic-start", "200"],
    "rcm-staged": [
        *("--student.discrete-iterations", "150", "--student.continuous-iterations", "350"),
        *("--student.critic-start", "400"),
    ],
    "imeanflow": ["--student.tangent-warmup", "150"],
}
# (method, samples, metric): (lowest, highest). Loose: a run that misses one has a bug.
FLOORS = {
    ("scm", "student, 1 step", "frechet_distance"): (0, 4.5),
    ("scm", "student, 1 step", "label_agreement"): (0.91, 1),
    ("scm", "student, 1 step", "same_noise_rmse"): (0, 0.24),
    ("ayf", "student, 4 steps", "frechet_distance"): (0, 2.4),
    ("ayf", "student, 4 steps", "same_noise_rmse"): (0, 0.09),
    ("meanflow", "student, 4 steps", "frechet_distance"): (0, 2.4),
    ("meanflow", "student, 4 steps", "same_noise_rmse"): (0, 0.09),
}
LOST_DIVERSITY = 0.05  # of the teacher's: DMD loses at least this much of its scm student's
METRICS = ("frechet_distance", "label_agreement", "same_noise_rmse", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(ITERATIONS), choices=ITERATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    teacher = options.runs / "teacher"
    train(teacher, ["--method", "scm", "--student.iterations", "1"])
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for method in options.methods:
            folder = options.runs / f"{method}-{seed}"
            train(folder, command(method, seed, teacher, options.runs))
            report = json.loads((folder / "report.json").read_text())
            results.setdefault(method, []).append({"seed": seed, "scores": report["scores"]})
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"iterations": ITERATIONS, "batch": 32, "lr": 2e-4, "warmup": WARMUP, "extra": EXTRA}
    content = {**environment(), "threads": 1, "settings": settings, "methods": results}
    (options.out / "methods.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table(results))
    missed = [
        f"seed {options.seeds[i]}: {line}"
        for i in range(len(options.seeds))
        for line in missed_floors({m: seeds[i]["scores"] for m, seeds in results.items()})
    ]
    print("\n".join(missed))
    sys.exit(bool(missed))


def missed_floors(scores: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A line for each floor that the runs of one seed, {method: scores}, miss."""
    missed = []
    for (method, samples, metric), (low, high) in FLOORS.items():
        if method in scores and not low <= scores[method][samples][metric] <= high:
            value = scores[method][samples][metric]
            missed.append(f"{method}, {samples}: {metric} {value:.3f} is not in [{low}, {high}]")
    if "scm" in scores and "dmd" in scores:
        scm, dmd = (scores[m]["student, 1 step"]["diversity"] for m in ("scm", "dmd"))
        lost = (scm - dmd) / scores["scm"]["teacher, 32 steps"]["diversity"]
        if lost < LOST_DIVERSITY:
            missed.append(f"dmd lost {lost:.3f} of the teacher's diversity, not {LOST_DIVERSITY}")
    return missed


def command(method: str, seed: int, teacher: Path, runs: Path) -> list[str]:
    """The options of a short run."""
    options = ["--method", method, "--teacher", str(teacher), "--seed", str(seed)]
    options += ["--student.iterations", str(ITERATIONS[method]), "--student.batch", "32"]
    options += ["--student.optimizer.lr", "2e-4", "--report-every", "1000"]
    if method in WARMUP:
        options += ["--student.tangent-warmup", str(WARMUP[method])]
    if method == "dmd":
        options += ["--student.start", str(runs / f"scm-{seed}")]
    return options + EXTRA.get(method, [])  # the last value of an option counts


def train(folder: Path, options: list[str]) -> None:
    """Do what is left of a run."""
    if not (folder / "report.json").exists():
        command = [sys.executable, "-m", "rcm.train", "digits", "--folder", str(folder), *options]
        subprocess.run(command, check=True)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means over the seeds of FD / agreement / diversity ratio / RMSE at 1, 2 and 4 steps."""
    lines = [
        "| method | iterations | 1 step | 2 steps | 4 steps |",
        "|---|---|---|---|---|",
    ]
    for method, seeds in results.items():
        cells = []
        for name in ("student, 1 step", "student, 2 steps", "student, 4 steps"):
            fd, agreement, rmse, diversity = (
                statistics.mean(seed["scores"][name][metric] for seed in seeds)
                for metric in METRICS
            )
            of_teacher = seeds[0]["scores"]["teacher, 32 steps"]["diversity"]
            cells.append(f"{fd:.2f} / {agreement:.3f} / {diversity / of_teacher:.2f} / {rmse:.3f}")
        lines.append(f"| {method} | {ITERATIONS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
