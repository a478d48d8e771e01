"""Where the transformers of diffusers have tokens, for context parallelism.

A plan names modules by their paths, in which * stands for any part of one component:
"blocks.*.attn1".
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Tokens:
    """The dimension of a tensor along which its tokens are.

    With `ndim`, only tensors of so many dimensions have tokens: times, for example, may be those of
    samples, (batch,), or of tokens, (batch, seqlen).
    """

    dim: int
    ndim: int | None = None


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """How the tokens of a class of networks are split.

    All calls between the splits and `output` then work on this rank's tokens. Tensors without
    tokens, such as the text of a cross-attention, are whole on every rank.
    """

    inputs: Mapping[str, Mapping[str, Tokens]] = field(default_factory=dict)
    """Arguments that are split, by module and by the argument's name. The path of the network
    itself is empty. Arguments that are None are left alone."""
    results: Mapping[str, Mapping[int, Tokens]] = field(default_factory=dict)
    """Results that are split, by module and by their position in the tuple; 0 for a tensor."""
    output: str
    """The module whose result (batch, seqlen, channels) is gathered."""
    attention: Mapping[str, tuple[str, ...]]
    """Modules in which all attention is among the tokens of all ranks, with the names of the
    arguments (batch, seqlen, channels) whose tokens are the queries and keys, in this order.
    Arguments that are None are left out."""


_BLOCK_TIMES = {"temb": Tokens(1, ndim=3), "embedded_timestep": Tokens(1, ndim=3)}
_TEXT_THEN_IMAGE = ("encoder_hidden_states", "hidden_states")

TOKEN_PLANS: Mapping[str, TokenPlan] = {
    "WanTransformer3DModel": TokenPlan(
        inputs={
            "": {"timestep": Tokens(1, ndim=2)},  # Wan2.2 5B: a time for each token
            "blocks.0": {"hidden_states": Tokens(1)},
        },
        results={"rope": {0: Tokens(1), 1: Tokens(1)}},
        output="proj_out",
        attention={"blocks.*.attn1": ("hidden_states",)},
    ),
    "CosmosTransformer3DModel": TokenPlan(
        inputs={
            "transformer_blocks.0": {"hidden_states": Tokens(1)},
            "transformer_blocks.*": {**_BLOCK_TIMES, "extra_pos_emb": Tokens(1)},
            "norm_out": _BLOCK_TIMES,
        },
        results={"rope": {0: Tokens(0), 1: Tokens(0)}},
        output="proj_out",
        attention={"transformer_blocks.*.attn1": ("hidden_states",)},
    ),
    "SD3Transformer2DModel": TokenPlan(
        results={"pos_embed": {0: Tokens(1)}, "context_embedder": {0: Tokens(1)}},
        output="proj_out",
        # attn2, of SD3.5, is among the tokens of the image alone.
        attention={"transformer_blocks.*.attn*": ("hidden_states", "encoder_hidden_states")},
    ),
    "FluxTransformer2DModel": TokenPlan(
        inputs={
            "": {
                "hidden_states": Tokens(1),
                "encoder_hidden_states": Tokens(1),
                "img_ids": Tokens(0, ndim=2),
                "txt_ids": Tokens(0, ndim=2),
            }
        },
        output="proj_out",
        # The attention of single blocks gets the joined tokens; the blocks know how many of each.
        attention={
            "transformer_blocks.*": _TEXT_THEN_IMAGE,
            "single_transformer_blocks.*": _TEXT_THEN_IMAGE,
        },
    ),
}


def token_plan(model: nn.Module) -> TokenPlan:
    """The plan of a network, by the name of its class or of a class that it derives from.

    Raises NotImplementedError if there is none.
    """
    for cls in type(model).__mro__:  # fully_shard derives a class
        if cls.__name__ in TOKEN_PLANS:
            return TOKEN_PLANS[cls.__name__]
    raise NotImplementedError(
        f"there is no token plan for {type(model).__name__}, so its tokens cannot be split among "
        f"ranks; there are plans for {', '.join(TOKEN_PLANS)}. Run it without context parallelism, "
        "or pass a TokenPlan"
    )


def modules_of(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules of a path in which * stands for any part of one component.

    Raises ValueError if there is none.
    """
    pattern = re.compile(re.escape(path).replace(r"\*", "[^.]*"))
    found = [module for name, module in model.named_modules() if pattern.fullmatch(name)]
    if not found:
        raise ValueError(
            f"the token plan names {path!r}, but {type(model).__name__} has no such module"
        )
    return found


def argument_positions(module: nn.Module, path: str, names: Iterable[str]) -> dict[str, int]:
    """The positions of arguments of a module's forward.

    Raises ValueError if it lacks one.
    """
    parameters = list(inspect.signature(module.forward).parameters)
    for name in names:
        if name not in parameters:
            raise ValueError(
                f"the token plan names the argument {name!r} of {path or 'the network'!r}, but "
                f"{type(module).__name__}.forward has {', '.join(parameters)}"
            )
    return {name: parameters.index(name) for name in names}
