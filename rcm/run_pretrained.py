"""A run on latents and text embeddings: distil a pretrained network of diffusers."""

from __future__ import annotations

import shutil
from dataclasses import replace

import torch

from jvp_attn import checkpoint_jvp, checkpoint_primal
from rcm.data.latents import Latents, LatentsConfig
from rcm.data.random_latents import write_random_latents
from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.context_parallel import ContextParallel
from rcm.distributed.layout import Layout
from rcm.distributed.loading import load_pretrained
from rcm.distributed.pretrained_folder import PretrainedFolder
from rcm.distributed.sharding import freeze, shard
from rcm.distributed.token_plans import token_plan
from rcm.errors import OptionError
from rcm.models.backbone import Backbone
from rcm.models.compiled_blocks import compile_blocks
from rcm.models.diffusers import DTYPES
from rcm.presets.tiny import perturb
from rcm.training.config import PretrainedConfig
from rcm.training.loop import announce, phase_text, train
from rcm.training.method import TEACHER
from rcm.training.run_folder import SYNTHETIC_DATA, RunFolder
from rcm.training.trainer import Trainer, build_networks

SYNTHETIC_SAMPLES = 64


def run_pretrained(
    folder: RunFolder, config: PretrainedConfig, device: torch.device, data: Latents | None
) -> None:
    """Do what is left of the distillation. Raises OptionError and RunError.

    data: of `open_inputs`.
    """
    trainer = pretrained_trainer(folder, config, device, data)
    if folder.layout.is_main:
        if trainer.iteration > 0:
            print(f"continuing {folder.path} at iteration {trainer.iteration}")
        if trainer.iteration < trainer.iterations:
            name = f"student ({config.method})"
            announce([phase_text(name, config.student, trainer.iteration)])
    train(trainer, folder, checkpoint_every=config.checkpoint_every)
    if folder.layout.is_main:
        print(f"finished {trainer.iteration} iterations; {folder.describe_last_checkpoint()}")


def pretrained_trainer(
    folder: RunFolder,
    config: PretrainedConfig,
    device: torch.device,
    data: Latents | None = None,
) -> Trainer:
    """The trainer at the folder's last checkpoint, or at the start. Raises like run_pretrained.

    Without data it makes synthetic ones.
    """
    layout = folder.layout
    networks = build_networks(
        config.student.roles(),
        lambda _: pretrained_network(config, layout, device),
        lambda _: pretrained_network(config, layout, device, frozen=True),
    )
    student = networks[config.student.result]
    assert isinstance(student, Backbone)
    if data is None:
        data = _synthetic_data(folder, config.data, student)
    last = folder.last_checkpoint()
    trainer = Trainer(
        "student",
        config.student,
        networks,
        data,
        seed=config.seed,
        layout=layout,
        accumulation=config.accumulation,
        device=device,
    )
    if last is not None:
        folder.restore(trainer, last)
    return trainer


def open_inputs(config: PretrainedConfig) -> Latents | None:
    """Look at the headers of all files, without reading weights or samples.

    Returns the data set, or None if the run makes its own.

    Raises:
        OptionError: a folder is not given, the start of the student is another run, or the model
            does not take the shape of the samples.
        RunError: the model's folder is incomplete or of another model, or the data do not fit it.
    """
    if not config.synthetic:
        for name, given in (("model", config.model.folder), ("data", config.data.folder)):
            if given is None:
                raise OptionError(
                    f"{config.preset} has no folder of its {name}; give it with --{name}.folder"
                )
    if config.student.start != TEACHER:
        raise OptionError(
            f"--student.start is {config.student.start!r}; it must be {TEACHER!r}, because this "
            "network is pretrained"
        )
    network = config.model.build_on_meta()
    try:
        network.require_sample_shape(config.data.sample_shape)
    except ValueError as error:
        raise OptionError(f"--data.sample-shape does not fit the model: {error}") from error
    if config.model.folder is not None:
        PretrainedFolder.open(config.model.model_folder()).tensors()
    if config.data.folder is None:
        return None
    data = config.data.load(network.condition_shapes, network.fixed_conditions)
    if config.student.guidance.active:
        data.null_condition({})
    return data


def pretrained_network(
    config: PretrainedConfig, layout: Layout, device: torch.device, *, frozen: bool = False
) -> Backbone:
    """The network of the config's folder, sharded, with its tokens split and its blocks
    checkpointed, and compiled if the config says so. Without a folder it has random weights. A
    frozen one keeps them in the dtype of the computation.

    Raises RunError if the folder cannot be used.
    """
    if config.model.folder is not None:
        with errors_on_every_rank():
            network = config.model.build_on_meta()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = config.model.build()
            perturb(network)
        network.to(device)
    blocks = [block for blocks in network.blocks for block in blocks]
    if config.compile:
        compile_blocks(blocks)
    param_dtype = None if config.model.dtype == "float32" else DTYPES[config.model.dtype]
    if frozen:
        freeze(network, param_dtype)
    shard(
        network.model,
        blocks,
        layout.parameter_mesh,
        data_size=layout.data_size,
        param_dtype=param_dtype,
    )
    if config.model.folder is not None:
        load_pretrained(
            network.model,
            config.model.model_folder(),
            remake_buffers=network.remake_buffers,
            device=device,
        )
    if layout.context_size > 1:
        network.attention = ContextParallel(
            network.model,
            token_plan(network.model),
            ring=layout.mesh.get_group("ring"),
            ulysses=layout.mesh.get_group("ulysses"),
            group=layout.context_group,
        ).attention
    two_passes = getattr(config.student, "passes", None) == "two"
    network.enable_gradient_checkpointing(checkpoint_jvp if two_passes else checkpoint_primal)
    return network


def _synthetic_data(folder: RunFolder, settings: LatentsConfig, network: Backbone) -> Latents:
    """Random samples, kept in the run folder. Raises RunError."""
    made = folder.path / SYNTHETIC_DATA
    with errors_on_every_rank():
        if folder.layout.is_main and not made.exists():
            partial = made.with_name(f"{made.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
            sizes = settings.condition_sizes(network.condition_shapes)
            write_random_latents(partial, SYNTHETIC_SAMPLES, settings.sample_shape, sizes)
            partial.rename(made)
    with errors_on_every_rank():
        settings = replace(settings, folder=str(made))
        return settings.load(network.condition_shapes, network.fixed_conditions)
