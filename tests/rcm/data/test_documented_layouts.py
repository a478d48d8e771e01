"""docs/data.md: its examples write folders that are good."""

import re
from pathlib import Path

import pytest
import torch

import rcm
from rcm.data.check import check_latents
from rcm.data.samples import SampleShapes

PAGE = Path(rcm.__file__).parents[1] / "docs" / "data.md"


def test_the_examples_write_a_good_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards, convert_negative = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    shapes = SampleShapes((16, 5, 12, 20), {"prompt_embeds": (32, 64)})
    exec(compile(write_shards, str(PAGE), "exec"), {})
    report = check_latents(tmp_path / "latents", shapes)
    assert (report.good, report.problems) == (8, [])

    (tmp_path / "latents" / "negative.safetensors").unlink()
    torch.save(torch.zeros(32, 64), "umT5_wan_negative_emb.pt")
    exec(compile(convert_negative, str(PAGE), "exec"), {})
    assert check_latents(tmp_path / "latents", shapes).problems == []
