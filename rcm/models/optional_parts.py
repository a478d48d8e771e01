"""Load the weights of a network that lacks some parts into one that has them.

A part is a parameter or a submodule that starts without effect on the output. Everything else is
loaded as torch does it: with strict=True, missing and unexpected entries raise.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn


def allow_absent(network: nn.Module, parts: Mapping[str, str | None]) -> None:
    """Let `network.load_state_dict` accept state dicts without the named parts.

    A part that is absent keeps its values, or copies another part's if that is named:
    {"end": None, "velocity_out": "tokens_out"}. A part of which only some entries are absent
    raises. Copies of the network keep this behaviour.
    """
    network.register_load_state_dict_pre_hook(partial(_fill, parts=dict(parts)))


def _fill(
    network: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
    parts: dict[str, str | None],
) -> None:
    own = network.state_dict()
    for part, source in parts.items():
        names = [name for name in own if name == part or name.startswith(f"{part}.")]
        if any(prefix + name in state_dict for name in names):
            continue
        for name in names:
            copied = f"{prefix}{source or part}{name.removeprefix(part)}"
            state_dict[prefix + name] = state_dict.get(copied, own[name])
