"""The adapter of docs/models.md makes a network of another class."""

import re
from pathlib import Path
from typing import Any

import torch

import rcm
from rcm.models.backbone import Backbone
from rcm.presets.tiny import perturb
from rcm.time_precision import require_unrounded_time

PAGE = (Path(rcm.__file__).parents[1] / "docs" / "models.md").read_text()
(ADAPTER,) = (
    code
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    if "Adapter(" in code
)


def test_the_adapter_of_auraflow() -> None:
    from diffusers import AuraFlowTransformer2DModel

    names: dict[str, Any] = {}
    exec(ADAPTER, names)
    model = AuraFlowTransformer2DModel(
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    perturb(model)
    net = Backbone(model, names["AURAFLOW"])
    x, t = torch.randn(2, 4, 6, 10), torch.tensor([0.4, 1.2])
    condition = {"prompt_embeds": torch.randn(2, 5, 8)}
    require_unrounded_time(net, x, t, condition)
    cos, sin = t.cos().view(-1, 1, 1, 1), t.sin().view(-1, 1, 1, 1)
    u = sin / (cos + sin)
    x_u = x / (cos + sin)
    (flow,) = model(x_u, condition["prompt_embeds"], u.flatten(), return_dict=False)
    f = net(x, t, condition)
    torch.testing.assert_close(cos * x - sin * f, x_u - u * flow, rtol=0, atol=2e-6)
    assert [len(blocks) for blocks in net.blocks] == [1, 1]
