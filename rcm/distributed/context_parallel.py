"""Context parallelism: the tokens of each sample are split among ranks.

For unmodified transformers of diffusers, also inside of torch.func.jvp. Hooks split the tokens
where a plan (token_plans.py) says so, and gather the network's output. Attention among all tokens
is `ContextParallel.attention`, which jvp_attn.replace_sdpa calls:

    parallel = ContextParallel(model, token_plan(model), ring=..., ulysses=..., group=...)
    with jvp_attn.replace_sdpa(parallel.attention):
        out, out_tangent = torch.func.jvp(model, ...)

Every rank gets the same inputs and has the same result. The gradient of each parameter, and of each
input, is the rank's share: its sum over the ranks is the gradient of a loss that all ranks compute
from the result and that counts once. A term of the loss that depends on parameters directly, and
not through the result, would count once per rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from jvp_attn import scaled_dot_product_attention
from rcm.distributed.collectives import AllGather, apply_collective
from rcm.distributed.context_attention import context_attention
from rcm.distributed.token_plans import TokenPlan, Tokens, argument_positions, modules_of
from rcm.distributed.token_split import TokenSplit

_SPLIT_MODELS: WeakSet[nn.Module] = WeakSet()


class ContextParallel:
    """Splits the tokens of one network among the ranks of ring × ulysses.

    The hooks fire again where a checkpoint computes a block again, in a backward pass, and need
    nothing from the first call but the block's arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: TokenPlan,
        *,
        ring: ProcessGroup,
        ulysses: ProcessGroup,
        group: ProcessGroup,
    ) -> None:
        """Register the hooks, before or after the model is sharded. With one rank there are none.

        Args:
            model: the network; all ranks have the same one.
            plan: where it has tokens.
            ring, ulysses: the groups of this rank in a mesh of ranks.
            group: all ranks of that mesh, in which the position in `ulysses` varies fastest.

        Raises:
            ValueError: the groups do not fit together, the plan names a module or an argument that
                the model lacks, or the tokens of the model are split already.
        """
        self.ring, self.ulysses, self.group = ring, ulysses, group
        self._split = TokenSplit(group.size(), group.rank())
        self._shares: tuple[int, ...] | None = None
        """The shares of the sequences of the attention module that is running, if one is."""
        self._attended = False
        _check_groups(ring, ulysses, group)
        if group.size() == 1:
            return
        if model in _SPLIT_MODELS:
            raise ValueError(f"the tokens of this {type(model).__name__} are split already")
        for path, arguments in plan.inputs.items():
            for module in modules_of(model, path):
                self._split_arguments(module, path, arguments)
        for path, results in plan.results.items():
            for module in modules_of(model, path):
                self._split_results(module, results)
        for path, names in plan.attention.items():
            for module in modules_of(model, path):
                self._watch_attention(module, path, names)
        for module in modules_of(model, plan.output):
            module.register_forward_hook(lambda _module, _args, y: self._gather(y))
        _SPLIT_MODELS.add(model)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention over the tokens of all ranks, in the modules that the plan names.

        In other modules, as in cross-attention, it is `jvp_attn.scaled_dot_product_attention`: of
        this rank's queries and the whole text.

        Args:
            query, key, value: (batch, heads, share, head_dim) over the tokens of all ranks;
                otherwise any shapes that `jvp_attn.scaled_dot_product_attention` accepts, which
                also describes the other arguments.

        Raises:
            NotImplementedError: over the tokens of all ranks, for a mask, is_causal or dropout.
            RuntimeError: the tokens are not those that the plan says.
        """
        if self._shares is None:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        self._attended = True
        self._check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        first_ranks = range(0, self.group.size(), self.ulysses.size())
        tokens = [
            self._split.tokens(self._shares, range(first, first + self.ulysses.size()))
            for first in first_ranks
        ]
        q, k, v = (_autocast(x).transpose(1, 2) for x in (query, key, value))
        out = context_attention(
            q, k, v, ring=self.ring, ulysses=self.ulysses, tokens=tokens, softmax_scale=scale
        )
        return out.transpose(1, 2)

    def _check_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        enable_gqa: bool,
    ) -> None:
        given = {"attn_mask": attn_mask is not None, "is_causal": is_causal}
        given["dropout_p"] = dropout_p > 0
        if unsupported := [name for name, is_given in given.items() if is_given]:
            raise NotImplementedError(
                f"attention over the tokens of several ranks got {', '.join(unsupported)}, which "
                "it does not support: masks are supported in cross-attention only. Run this "
                "network without context parallelism"
            )
        share = sum(self._shares or ())
        lengths = [x.shape[-2] for x in (query, key, value)]
        if query.ndim != 4 or lengths != [share] * 3:
            raise RuntimeError(
                f"attention has query, key and value of shapes {tuple(query.shape)}, "
                f"{tuple(key.shape)} and {tuple(value.shape)}, but by the token plan each must be "
                f"(batch, heads, {share}, head_dim): attention to other tokens inside of this "
                "module is not supported with context parallelism"
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(
                f"query has {query.shape[1]} heads and key {key.shape[1]}; heads may be grouped "
                "with enable_gqa=True"
            )

    # ------------------------------------------------------------------------
    # Hooks

    def _split_arguments(
        self, module: nn.Module, path: str, arguments: Mapping[str, Tokens]
    ) -> None:
        positions = argument_positions(module, path, arguments)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new_args, new_kwargs = list(args), dict(kwargs)
            for name, tokens in arguments.items():
                if name in kwargs:
                    new_kwargs[name] = self._own(kwargs[name], tokens)
                elif positions[name] < len(args):
                    new_args[positions[name]] = self._own(args[positions[name]], tokens)
            return tuple(new_args), new_kwargs

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _split_results(self, module: nn.Module, results: Mapping[int, Tokens]) -> None:
        def hook(_module: nn.Module, _args: Any, result: Any) -> Any:
            if isinstance(result, Tensor):
                return self._own(result, results[0])
            return tuple(
                self._own(x, results[i]) if i in results else x for i, x in enumerate(result)
            )

        module.register_forward_hook(hook)

    def _watch_attention(self, module: nn.Module, path: str, names: tuple[str, ...]) -> None:
        positions = argument_positions(module, path, names)

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (
                kwargs.get(name, args[i] if i < len(args) else None)
                for name, i in positions.items()
            )
            self._shares = tuple(x.shape[1] for x in given if x is not None)
            self._attended = False

        def check(*_: Any) -> None:
            if not self._attended:
                raise RuntimeError(
                    f"{path} of a network whose tokens are split did not call its "
                    "ContextParallel.attention, so its queries did not see all keys: run the "
                    "network inside of jvp_attn.replace_sdpa(parallel.attention)"
                )

        def leave(*_: Any) -> None:
            self._shares = None

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(check)
        module.register_forward_hook(leave, always_call=True)

    def _own(self, x: Tensor | None, tokens: Tokens) -> Tensor | None:
        if x is None or (tokens.ndim is not None and x.ndim != tokens.ndim):
            return x
        return self._split.own(x, tokens.dim)

    def _gather(self, y: Tensor) -> Tensor:
        total = self._split.total(y.shape[1])
        (whole,) = apply_collective(AllGather(self.group, 1), y)
        return whole[:, :total]


def _check_groups(ring: ProcessGroup, ulysses: ProcessGroup, group: ProcessGroup) -> None:
    in_ring, in_ulysses, ranks = map(dist.get_process_group_ranks, (ring, ulysses, group))
    first = ring.rank() * len(in_ulysses)
    expected_ring = ranks[ulysses.rank() :: len(in_ulysses)]
    if in_ring != expected_ring or in_ulysses != ranks[first : first + len(in_ulysses)]:
        raise ValueError(
            f"ring has ranks {in_ring}, ulysses {in_ulysses} and group {ranks}; group must have "
            "all ranks of ring × ulysses, in an order in which the rank in ulysses varies fastest"
        )


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch's autocast chooses for attention."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
