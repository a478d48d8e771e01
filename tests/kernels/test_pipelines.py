"""Kernel pipelines, as the CUDA backend launches them: the error bounds of one kernel still hold.

The tests of single kernels supply exact intermediate results. Here each kernel reads what the
kernels before it wrote.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from jvp_attn.backends.kernel_table import ELEMENTS, HEAD_DIMS, KERNELS, kernel_name
from tests.kernels.cases import Case, covering
from tests.kernels.harness import WRITES
from tests.kernels.kernel_case import kernel_test

PIPELINES = {
    "tangent only": ("forward", "tangent_only"),
    "backward": ("forward", "preprocess", "backward_dq", "backward_dkv"),
    "backward, atomic dq": ("forward", "preprocess", "backward", "bwd_postprocess"),
    "jvp backward": ("forward_jvp", "preprocess", "jvp_backward_dq", "jvp_backward_dkv"),
}


def kernels_of(
    steps: Iterable[str], element: str, head_dim: int, masked: bool, arch: str
) -> list[str]:
    """Those for sm80 where the architecture has none. The table may lack some of the names."""
    kernels = []
    for step in steps:
        own = kernel_name(step, element, head_dim, masked, arch)
        names = (own, kernel_name(step, element, head_dim, masked), kernel_name(step, element))
        kernels.append(next((name for name in names if name in KERNELS), own))
    return kernels


# (pipeline, element, head_dim, arch), by name.
BUILT_PIPELINES = {
    f"{pipeline} {element} {head_dim} {arch}": (pipeline, element, head_dim, arch)
    for pipeline in PIPELINES
    for element in ELEMENTS
    for head_dim in HEAD_DIMS
    for arch in ("sm80", "sm90")
    if (kernels := kernels_of(PIPELINES[pipeline], element, head_dim, masked=False, arch=arch))
    and KERNELS.keys() >= set(kernels)
    and any(KERNELS[name].arch == arch for name in kernels)
}
AXES = {
    "data": ("plain", "offset", "large logits"),
    "mask": ("none", "boolean", "additive_float32"),
    "mask hides": ("some", "whole rows", "the first keys"),
    "causal": ("no", "bottom_right", "top_left"),
    "sequences": ("one", "packed", "packed and padded"),
    "head dims": ("full", "odd"),
}
# What the kernels for compute capability 9.0 support.
SM90_AXES = {**AXES, "mask": ("none",), "head dims": ("full", "even")}


def over_configs(arch: str, strength: int) -> pytest.MarkDecorator:
    """Parametrize by configs of the pipelines for an architecture."""
    names = tuple(name for name, pipeline in BUILT_PIPELINES.items() if pipeline[3] == arch)
    axes = SM90_AXES if arch == "sm90" else AXES
    cases = covering({"pipeline": names, **axes}, strength)
    ids = [f"{case['pipeline']}-{i}" for i, case in enumerate(cases)]
    return pytest.mark.parametrize("config", cases, ids=ids)


@over_configs("sm80", strength=2)
def test_all_outputs_of_a_pipeline(config: Case) -> None:
    assert_all_outputs_are_right(config)


@over_configs("sm90", strength=1)
def test_all_outputs_of_an_sm90_pipeline(config: Case) -> None:
    assert_all_outputs_are_right(config)


@pytest.mark.exhaustive
@over_configs("sm90", strength=2)
def test_all_pairs_of_settings_of_sm90_pipelines(config: Case) -> None:
    assert_all_outputs_are_right(config)


def assert_all_outputs_are_right(config: Case) -> None:
    pipeline, element, head_dim, arch = BUILT_PIPELINES[config["pipeline"]]
    masked = config["mask"] != "none"
    kernels = kernels_of(PIPELINES[pipeline], element, head_dim, masked, arch)
    case: Case = {
        **config,
        "kernel": kernels[0],
        "queries": "several tiles",
        "keys": "several tiles",
        "heads": "4 over 2",
        "mask dims": "bhrc",
        "layouts": "all dense",
        "scale": "default",
        "tangents": "" if pipeline.startswith("backward") else "q k v",
        "cotangents": "out lse" if pipeline.startswith("backward") else "out lse tout mu",
    }
    test = kernel_test(case)
    written = [name for step in PIPELINES[pipeline] for name in WRITES[step].split()]
    outputs = test.outputs_of(written)
    test.launch(outputs, tuple(outputs)).run(*kernels)
    found = {name: buffer.view for name, buffer in outputs.items()}
    if pipeline == "backward, atomic dq":
        del found["delta"]  # only the kernels that compute dQ alone correct it
    faults = test.faults(found)
    assert not faults, (case, faults)
