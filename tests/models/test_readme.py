"""README's example with diffusers runs, on a small model in place of the one that it downloads."""

from __future__ import annotations

import pytest

from tests.package.test_docs import README, examples


def test_the_example_with_diffusers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanTransformer3DModel

    small = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1
    )
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda name, subfolder: small)
    [code] = [code for code in examples(README) if "diffusers" in code]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == names["out_tangent"].shape == names["x"].shape
    assert names["out_tangent"].any()
