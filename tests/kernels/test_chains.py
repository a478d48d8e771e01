"""One kernel after another, as the attention maps launch them: errors do not add up.

A kernel alone is given exact statistics; here it has those of the kernels before it.
"""

from __future__ import annotations

import pytest

from jvp_attn.backends.kernel_table import ELEMENTS, HEAD_DIMS, KERNELS, kernel_name
from tests.kernels.cases import Case, covering
from tests.kernels.harness import WRITES
from tests.kernels.trial import trial

CHAINS = {
    "tangent": ("forward", "tangent_only"),
    "backward": ("forward", "preprocess", "backward_dq", "backward_dkv"),
    "backward in one": ("forward", "preprocess", "backward", "bwd_postprocess"),
    "tangent backward": (
        "forward_jvp",
        "preprocess",
        "jvp_backward_dq",
        "jvp_backward_dkv",
    ),
}


def kernels_of(chain: str, element: str, head_dim: int, masked: bool, arch: str) -> list[str]:
    """The kernels of a chain, those of sm80 where the architecture has none; some may not exist."""
    kernels = []
    for step in CHAINS[chain]:
        own = kernel_name(step, element, head_dim, masked, arch)
        names = (own, kernel_name(step, element, head_dim, masked), kernel_name(step, element))
        kernels.append(next((name for name in names if name in KERNELS), own))
    return kernels


# Each chain, of the kernels for an element and a head dim, by its name.
EVERY_CHAIN = {
    f"{chain} {element} {head_dim} {arch}": (chain, element, head_dim, arch)
    for chain in CHAINS
    for element in ELEMENTS
    for head_dim in HEAD_DIMS
    for arch in ("sm80", "sm90")
    if (kernels := kernels_of(chain, element, head_dim, masked=False, arch=arch))
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
# What the kernels of 9.0 serve.
AXES_ON_HOPPER = {**AXES, "mask": ("none",), "head dims": ("full", "even")}


def over_chains(arch: str, strength: int) -> pytest.MarkDecorator:
    """Over circumstances of the chains for an architecture."""
    chains = tuple(name for name, chain in EVERY_CHAIN.items() if chain[3] == arch)
    axes = AXES_ON_HOPPER if arch == "sm90" else AXES
    cases = covering({"chain": chains, **axes}, strength)
    ids = [f"{case['chain']}-{i}" for i, case in enumerate(cases)]
    return pytest.mark.parametrize("circumstances", cases, ids=ids)


@over_chains("sm80", strength=2)
def test_all_outputs_of_a_chain(circumstances: Case) -> None:
    assert_all_outputs_are_right(circumstances)


@over_chains("sm90", strength=1)
def test_all_outputs_of_a_chain_on_hopper(circumstances: Case) -> None:
    assert_all_outputs_are_right(circumstances)


@pytest.mark.slow
@over_chains("sm90", strength=2)
def test_every_pair_of_circumstances_on_hopper(circumstances: Case) -> None:
    assert_all_outputs_are_right(circumstances)


def assert_all_outputs_are_right(circumstances: Case) -> None:
    chain, element, head_dim, arch = EVERY_CHAIN[circumstances["chain"]]
    masked = circumstances["mask"] != "none"
    kernels = kernels_of(chain, element, head_dim, masked, arch)
    case: Case = {
        **circumstances,
        "kernel": kernels[0],
        "queries": "several tiles",
        "keys": "several tiles",
        "heads": "4 over 2",
        "mask dims": "bhrc",
        "layouts": "all dense",
        "scale": "default",
        "tangents": "" if chain.startswith("backward") else "q k v",
        "cotangents": "out lse" if chain.startswith("backward") else "out lse tout mu",
    }
    checked = trial(case)
    written = [name for step in CHAINS[chain] for name in WRITES[step].split()]
    outputs = checked.outputs_of(written)
    checked.launch(outputs, tuple(outputs)).run(*kernels)
    found = {name: buffer.view for name, buffer in outputs.items()}
    if chain == "backward in one":
        del found["delta"]  # the kernels of dQ alone make it sharper than what rounding leaves
    faults = checked.faults(found)
    assert not faults, (case, faults)
