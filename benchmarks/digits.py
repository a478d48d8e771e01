"""Results of the preset `digits` for several seeds: the table of docs/digits.md.

    python benchmarks/digits.py [--seeds 0 1 2] [--runs FOLDER] [--out FOLDER]

Runs `python -m rcm.train` for each seed. Finished runs are not repeated. Writes digits.json, and
digits.png with the grid of the first seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    folders = [options.runs / f"digits-seed{seed}" for seed in options.seeds]
    seeds = [run(folder, seed) for folder, seed in zip(folders, options.seeds, strict=True)]
    options.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((folders[0] / "config.json").read_text())
    result = {**environment(), "threads": settings["threads"], "seeds": seeds}
    (options.out / "digits.json").write_text(json.dumps(result, indent=2) + "\n")
    shutil.copy(folders[0] / "grid.png", options.out / "digits.png")
    print(table(seeds))


def run(folder: Path, seed: int) -> dict[str, Any]:
    """Scores of one seed and the seconds of its command, None if the run was only continued."""
    new = not folder.exists()
    start = time.monotonic()
    command = [sys.executable, "-m", "rcm.train", "--folder", str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True)
    seconds = round(time.monotonic() - start) if new else None
    return {**json.loads((folder / "report.json").read_text()), "seconds": seconds}


def table(seeds: list[dict[str, Any]]) -> str:
    """A Markdown table of FD and label agreement with one column per seed."""
    names = " | ".join(f"seed {report['seed']}" for report in seeds)
    lines = [f"| FD ↓ / label agreement ↑ | {names} |", "|---" * (len(seeds) + 1) + "|"]
    for name in seeds[0]["scores"]:
        scores = [report["scores"][name] for report in seeds]
        cells = [f"{s['frechet_distance']:.2f} / {s['label_agreement']:.3f}" for s in scores]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
