"""Record the losses of the first iterations of every method.

    .venv/bin/python -m tests.rcm.methods.record

They are computed in float64, so that they hardly depend on the processor, and at learning rates
that do not change with the presets.
"""

import json
from pathlib import Path

import torch

from rcm.training.optimization import OptimizerConfig
from tests.rcm.methods.digits_methods import METHODS, digits_trainer

RECORD = Path(__file__).with_name("recorded_losses.json")
ITERATIONS = 20


def losses(method: str) -> list[dict[str, float]]:
    """The losses of every iteration, by the name of the metric."""
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = OptimizerConfig(lr=5e-5 if method == "dmd" else 1e-4)
        trainer = digits_trainer(method, ITERATIONS, optimizer=optimizer)
        metrics = [trainer.step() for _ in range(ITERATIONS)]
    finally:
        torch.set_default_dtype(torch.float32)
    return [{name: m[name] for name in m if name.endswith("loss")} for m in metrics]


def main() -> None:
    methods = (f"  {json.dumps(method)}: {json.dumps(losses(method))}" for method in METHODS)
    version = json.dumps(torch.__version__.partition("+")[0])
    RECORD.write_text(
        f'{{\n "torch": {version},\n "losses": {{\n' + ",\n".join(methods) + "\n }\n}\n"
    )


if __name__ == "__main__":
    main()
