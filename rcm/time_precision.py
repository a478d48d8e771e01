"""Checks that a network does not round its time below float32, which makes distillation collapse.

A cast of the timestep to the model's dtype is easy to overlook in an adapter, a pipeline or a
network of another library. Two checks find it:

    require_unrounded_time  calls a network once and follows its time through all operations
    guard_time              makes the timestep embeddings of a model check every call
"""

import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from rcm.derivatives import restored_random_state
from rcm.trigflow import Network, network_time, require_precise_time

# Modules that receive the timestep in diffusers, in the published code of DiT and SiT, and here.
TIME_EMBEDDINGS = ("Timesteps", "GaussianFourierProjection", "TimestepEmbedder", "TimeEmbedding")
_COPIES = {torch.ops.aten.expand.default, torch.ops.aten.repeat.default}


def require_unrounded_time(
    net: Network, x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None
) -> None:
    """Raise ValueError if the network casts its time, or a function of it, to 16 bits or fewer.

    It evaluates the network once, without gradients, and follows t (batch,), and `end` if given,
    through every operation up to the features of a timestep embedding, which may be of any dtype.
    Outputs do not matter: a network whose output is still zero is checked as well as a trained one,
    and so is a network inside of conversions, whose outputs depend on t in any case. Compiled
    networks run uncompiled. The random state is left as it was.

    It does not see a time that leaves PyTorch, for example by `t.item()`, or that a custom kernel
    rounds. Rounding to integers is allowed: networks of DDPM are defined at integer timesteps.
    """
    time = network_time(t, x)
    times = [time] if end is None else [time, network_time(end, x)]
    second_time = {} if end is None else {"end": times[1]}
    with torch.no_grad(), restored_random_state(x), _FollowTime(times):
        net(x, time, condition, **second_time)


class _FollowTime(TorchDispatchMode):
    """Raise ValueError at the first operation that rounds one of the times.

    What is computed from a time is a time too, as long as it is not larger or is a mere copy. A
    larger tensor is the features of an embedding, or the samples. Masks are no times.
    """

    def __init__(self, times: list[Tensor]) -> None:
        super().__init__()
        self.times = {id(time): time for time in times}  # a reference keeps the id unique

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        times = [self.times[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self.times]
        if times and not _ignores_values(func):
            size = max(time.numel() for time in times)
            for tensor in tree_leaves(out):
                if not isinstance(tensor, Tensor) or tensor.dtype == torch.bool:
                    continue
                if tensor.numel() <= size or func in _COPIES:
                    _require_float32(tensor)
                    self.times[id(tensor)] = tensor
        return out


def _ignores_values(func: Any) -> bool:
    """Operations such as zeros_like and new_ones take only the shape of a tensor."""
    name = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_")


def _require_float32(time: Tensor) -> None:
    if time.is_floating_point() and torch.finfo(time.dtype).bits < 32:
        raise ValueError(
            f"the network rounds its time to {time.dtype}{_caller()}; the time must stay float32 "
            "or float64 up to the timestep embedding. Common causes are a cast of the timestep to "
            "the model's dtype, autocast, and FSDP2's MixedPrecisionPolicy with "
            "cast_forward_inputs=True"
        )


def _caller() -> str:
    """Where the cast is: the innermost line outside of PyTorch and of this file."""
    ours = {Path(torch.__file__).parent, Path(__file__)}
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.exists() and not ours & {path, *path.parents}:
            return f" in {frame.filename}, line {frame.lineno}"
    return ""


def guard_time(model: nn.Module, names: Collection[str] = TIME_EMBEDDINGS) -> list[RemovableHandle]:
    """Make the timestep embeddings of a model raise ValueError for times below float32.

    Embeddings are the modules whose class has one of the names, or one that ends in "Timesteps", as
    in diffusers. Their first argument is the time; integers are allowed. Returns one handle per
    embedding, to remove the checks. Raises ValueError if the model has no such module: pass the
    name of its class.
    """
    embeddings = [
        module
        for module in model.modules()
        if type(module).__name__ in names or type(module).__name__.endswith("Timesteps")
    ]
    if not embeddings:
        raise ValueError(
            f"{type(model).__name__} has no timestep embedding, a module whose class is "
            f"{', '.join(names)} or ...Timesteps; pass the name of its class in `names`"
        )

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if time.is_floating_point():
            require_precise_time(time)

    return [module.register_forward_pre_hook(check, with_kwargs=True) for module in embeddings]
