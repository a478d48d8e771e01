"""With an older torch, the packages raise one clear line."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import jvp_attn
import rcm


@pytest.mark.parametrize("version", ["2.10.1+cu128", "2.9.0", "1.13"])
def test_jvp_attn_names_the_torch_it_needs(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its other modules, which an older torch cannot import."""
    monkeypatch.setattr(torch, "__version__", version)
    for name in [name for name in sys.modules if name.startswith("jvp_attn.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError) as raised:
        importlib.reload(jvp_attn)
    assert str(raised.value) == (
        f"jvp_attn needs torch 2.11 or newer, but torch {version} is installed: "
        "run pip install 'torch>=2.11'"
    )
    assert not [name for name in sys.modules if name.startswith("jvp_attn.")]


@pytest.mark.parametrize("version", ["2.12.1+cpu", "2.9.0"])
def test_rcm_names_the_torch_it_needs(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError) as raised:
        importlib.reload(rcm)
    assert str(raised.value) == (
        f"rcm needs torch 2.13 or newer, but torch {version} is installed: "
        "run pip install 'torch>=2.13'"
    )


@pytest.mark.parametrize("version", ["2.13.0", "2.15.0.dev20261120+cpu", "3.0"])
def test_a_newer_torch_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    importlib.reload(sys.modules["jvp_attn.torch_version"])
    importlib.reload(rcm)
