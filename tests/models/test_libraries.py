"""The libraries that `replace_sdpa` supports can be imported next to the installed torch."""

import subprocess
import sys

import pytest

LIBRARIES = {
    "diffusers": (
        "WanTransformer3DModel",
        "CosmosTransformer3DModel",
        "SD3Transformer2DModel",
        "DiTTransformer2DModel",
        "FlowMatchEulerDiscreteScheduler",
    ),
    "transformers": ("BertModel", "ModernBertModel"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_its_networks_can_be_imported(library: str) -> None:
    script = f"from {library} import {', '.join(LIBRARIES[library])}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
