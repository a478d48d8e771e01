"""Pretrained weights, read from a folder straight into the shards of a network.

    with torch.device("meta"):                              no memory
        network = WanTransformer3DModel.from_config(...)
    shard(network, network.blocks, mesh, data_size=...)     still none
    load_pretrained(network, folder, remake_buffers=...)    this rank's shards

No rank ever holds the whole network, and each reads only its rows of every weight. Student, critic
and teacher are loaded one after the other: a sharded network cannot be copied.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_leaves

from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.pretrained_folder import PretrainedFolder, listing
from rcm.distributed.stored_tensors import StoredTensor
from rcm.errors import RunError

Buffers = Mapping[str, Tensor]


def load_pretrained(
    network: nn.Module,
    folder: str | Path,
    *,
    remake_buffers: Callable[[], Buffers] | None = None,
    device: torch.device | None = None,
) -> None:
    """Give a network on the meta device memory, and the weights of a diffusers folder.

    network: whole or sharded; its weights keep their dtype, whatever that of the files.
    folder: of the network, or of a pipeline with the network in transformer/.
    remake_buffers: returns all tensors of the network that no file contains, by name: its
        non-persistent buffers, and tensors that are plain attributes of a module.
    device: where the weights go; None is the device of the mesh, or the CPU without one.

    Errors are raised on every rank, and before anything is loaded except for the last one:
        RunError: the folder is missing, incomplete or damaged; or its network is of another class,
            has other settings, or other names or shapes of tensors.
        ValueError: the network is not on the meta device or has shared weights; remake_buffers
            lacks a tensor, or returns one of another shape or dtype.
        OSError: a file cannot be read, or changed since its header was read.
    """
    device = _device(network) if device is None else device
    with errors_on_every_rank():
        _require_meta(network)
        stored = _matching_tensors(network, PretrainedFolder.open(folder))
        buffers = _complete_buffers(network, {} if remake_buffers is None else remake_buffers())
    with errors_on_every_rank(), torch.no_grad():
        network.to_empty(device=device)
        _set_buffers(network, buffers, device)
        _read_into(network.state_dict(), stored)


# ---- checks ------------------------------------------------------------------------------------


def _device(network: nn.Module) -> torch.device:
    """Where the shards belong."""
    for parameter in network.parameters():
        if isinstance(parameter, DTensor):
            return torch.device(parameter.device_mesh.device_type)
    return torch.device("cpu")


def _require_meta(network: nn.Module) -> None:
    parameters = dict(network.named_parameters(remove_duplicate=False))
    if on_device := [name for name, p in parameters.items() if not p.is_meta]:
        raise ValueError(
            f"{listing(on_device)} are not on the meta device; build the network inside of "
            "torch.device('meta')"
        )
    if len({id(p) for p in parameters.values()}) < len(parameters):
        raise ValueError(f"{type(network).__name__} shares weights, which cannot be loaded")


def _matching_tensors(network: nn.Module, folder: PretrainedFolder) -> dict[str, StoredTensor]:
    """The stored tensor of every weight and persistent buffer."""
    folder.require_class(*_class_names(network))
    _require_settings(network, folder)
    stored, expected = folder.tensors(), network.state_dict()
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    missing = [name for name in expected if name not in stored]
    extra = [
        name
        for name in stored
        if name not in expected and not any(re.search(pattern, name) for pattern in ignored)
    ]
    differing = [
        f"{name} (stored {stored[name].shape}, expected {tuple(tensor.shape)})"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    differing += [
        f"{name} (stored {stored[name].dtype}, expected {tensor.dtype})"
        for name, tensor in expected.items()
        if name in stored and stored[name].dtype.is_floating_point != tensor.dtype.is_floating_point
    ]
    problems = [
        f"{len(names)} {what}: {listing(names)}"
        for names, what in (
            (missing, "tensors are missing"),
            (extra, "tensors are not in the network"),
            (differing, "tensors have another shape or kind"),
        )
        if names
    ]
    if problems:
        raise RunError(
            f"{folder.path} does not fit this {_class_names(network)[0]}: {'; '.join(problems)}"
        )
    return {name: stored[name] for name in expected}


def _class_names(network: nn.Module) -> list[str]:
    """Its class and the base classes, without those that FSDP2 puts first."""
    classes = type(network).__mro__
    if isinstance(network, FSDPModule):
        classes = classes[classes.index(FSDPModule) + 1 :]
    return [cls.__name__ for cls in classes]


def _require_settings(network: nn.Module, folder: PretrainedFolder) -> None:
    """Other settings may have weights of the same shapes, such as another number of heads."""
    own: Mapping[str, Any] = getattr(network, "config", {})
    for name, setting in folder.config.items():
        if name.startswith("_") or name not in own:
            continue
        if json.loads(json.dumps(own[name])) != setting:
            raise RunError(
                f"{folder.path} is a network with {name} {setting!r}; this one has {own[name]!r}"
            )


# ---- buffers -----------------------------------------------------------------------------------


def _unsaved_tensors(network: nn.Module) -> dict[str, Tensor]:
    """What a state dict lacks: non-persistent buffers, and plain attributes on the meta device."""
    saved = network.state_dict().keys()
    buffers = network.named_buffers(remove_duplicate=False)
    unsaved = {name: buffer for name, buffer in buffers if name not in saved}
    for prefix, module in network.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            name = f"{prefix}.{attribute}".lstrip(".")
            if isinstance(value, Tensor) and value.is_meta:
                unsaved[name] = value
            elif any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(value)):
                raise ValueError(
                    f"{name} holds tensors in a {type(value).__name__}; make them buffers"
                )
    return unsaved


def _complete_buffers(network: nn.Module, remade: Buffers) -> Buffers:
    """All unsaved tensors; none may stay uninitialised."""
    unsaved = _unsaved_tensors(network)
    if absent := [name for name in unsaved if name not in remade or remade[name].is_meta]:
        raise ValueError(
            f"{len(absent)} buffers are in no file and must be remade: {listing(absent)}"
        )
    for name, tensor in unsaved.items():
        if remade[name].shape != tensor.shape or remade[name].dtype != tensor.dtype:
            raise ValueError(
                f"the remade buffer {name} is {remade[name].dtype} of shape "
                f"{tuple(remade[name].shape)}; expected {tensor.dtype} of {tuple(tensor.shape)}"
            )
    return {name: remade[name] for name in unsaved}


def _set_buffers(network: nn.Module, buffers: Buffers, device: torch.device) -> None:
    for name, tensor in buffers.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(prefix), attribute, tensor.to(device, copy=True))


# ---- reading -----------------------------------------------------------------------------------


def _read_into(targets: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Read each file once, in the order of its bytes, and only this rank's rows."""
    order = sorted(stored, key=lambda name: (stored[name].file, stored[name].offset))
    for path, names in groupby(order, key=lambda name: stored[name].file):
        with path.open("rb", buffering=0) as file:
            for name in names:
                source, target = stored[name], targets[name]
                if os.fstat(file.fileno()).st_size != source.file_size:
                    raise OSError(f"{path} changed its size since its header was read")
                if isinstance(target, DTensor):
                    start, local = _local_rows(target)
                    local.copy_(source.read_rows(file, start, len(local)))
                else:
                    target.copy_(source.read(file))


def _local_rows(tensor: DTensor) -> tuple[int, Tensor]:
    """This rank's rows of a tensor and the index of the first one."""
    dimension, placement = tensor.device_mesh.ndim - 1, tensor.placements[-1]
    if placement != Shard(0) or any(p != Replicate() for p in tensor.placements[:-1]):
        raise ValueError(f"a weight has placements {tensor.placements}; expected those of shard()")
    size = tensor.device_mesh.size(dimension)
    rows = -(-tensor.shape[0] // size)  # of every rank but the last ones
    start = min(rows * tensor.device_mesh.get_local_rank(dimension), tensor.shape[0])
    return start, tensor.to_local()
