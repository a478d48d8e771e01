"""`replace_sdpa` raises where a library computes attention without torch's function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.func import jvp

from jvp_attn import replace_sdpa
from tests.jvp_attn.attention_cases import assert_close
from tests.models.networks import Network, bert, wan


@pytest.fixture(autouse=True)
def _restore_attention_backend() -> Iterator[None]:
    """diffusers keeps the backend of one model as the default of new models."""
    yield
    wan().module.set_attention_backend("native")


def tangent(network: Network) -> torch.Tensor:
    return jvp(network, network.inputs, network.inputs)[1]


def test_other_backends_of_diffusers_raise() -> None:
    network = wan()
    network.module.set_attention_backend("flex")
    with replace_sdpa(), pytest.raises(NotImplementedError) as raised:
        tangent(network)
    assert "attention of diffusers is set to 'flex'" in str(raised.value)
    assert "call model.set_attention_backend('native')" in str(raised.value)


def test_other_attention_of_transformers_raises() -> None:
    network = bert()
    network.module.set_attn_implementation("flex_attention")
    with replace_sdpa(), pytest.raises(NotImplementedError) as raised:
        tangent(network)
    assert "attention of transformers is set to 'flex_attention'" in str(raised.value)
    assert "call model.set_attn_implementation('sdpa')" in str(raised.value)


@pytest.mark.parametrize("backend", ["native", "_native_flash", "_native_math"])
def test_variants_of_torchs_function_work(backend: str) -> None:
    network = wan()
    with replace_sdpa():
        expected = tangent(network)
        network.module.set_attention_backend(backend)
        assert torch.equal(tangent(network), expected)


def registered() -> dict[str, tuple[Any, Any]]:
    """Every registered attention function of both libraries: name → (registry, key)."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry
    from transformers.modeling_utils import AttentionInterface

    tables = _AttentionBackendRegistry._backends, AttentionInterface._global_mapping
    return {str(getattr(n, "value", n)): (table, n) for table in tables for n in table}


def test_attention_of_other_packages_raises_whether_or_not_they_are_installed() -> None:
    with replace_sdpa():
        tangent(wan())  # replace_sdpa guards the registries on the first call inside the block
        names = registered()
        other = [n for n in names if any(x in n for x in ("flash_", "flex", "sage", "xformers"))]
        assert {"flash_hub", "flash_attention_2", "sage", "xformers"} < set(other)
        for name in set(other) - {"_native_flash"}:
            table, key = names[name]
            with pytest.raises(NotImplementedError, match="has no forward derivative"):
                table[key]()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_other_attention_works_outside_the_block() -> None:
    network = wan()
    with replace_sdpa():
        expected = network(*network.inputs)
    network.module.set_attention_backend("flex")
    with torch.no_grad():  # flex attention has no backward on a CPU
        assert_close({"out": network(*network.inputs)}, {"out": expected})
