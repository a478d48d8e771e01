"""A run on latents and text embeddings: distil a pretrained network of diffusers."""

from __future__ import annotations

from dataclasses import replace

import torch

from jvp_attn import checkpoint_jvp, checkpoint_primal
from rcm.data.latents import Latents
from rcm.data.random_latents import write_random_latents
from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.context_parallel import ContextParallel
from rcm.distributed.layout import Layout
from rcm.distributed.loading import load_pretrained
from rcm.distributed.sharding import freeze, shard
from rcm.distributed.token_plans import token_plan
from rcm.errors import OptionError
from rcm.models.backbone import Backbone
from rcm.models.compiled_blocks import compile_blocks
from rcm.models.diffusers import DTYPES
from rcm.presets.tiny import perturb
from rcm.training.config import PretrainedConfig
from rcm.training.loop import train
from rcm.training.method import TEACHER
from rcm.training.run_folder import SYNTHETIC_DATA, RunFolder
from rcm.training.trainer import Trainer, build_networks

SYNTHETIC_SAMPLES = 64


def run_pretrained(folder: RunFolder, config: PretrainedConfig, device: torch.device) -> None:
    """Do what is left of the distillation. Raises OptionError and RunError."""
    layout = folder.layout
    networks = build_networks(
        config.student.roles(),
        lambda start: pretrained_network(config, start, layout, device),
        lambda start: pretrained_network(config, start, layout, device, frozen=True),
    )
    student = networks[config.student.result]
    assert isinstance(student, Backbone)
    data = _load_data(folder, config, student)
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
        if layout.is_main:
            print(f"continuing {folder.path} at iteration {last.iteration}")
        folder.restore(trainer, last)
    train(trainer, folder, checkpoint_every=config.checkpoint_every)
    if layout.is_main:
        print(f"finished {trainer.iteration} iterations; {folder.describe_last_checkpoint()}")


def pretrained_network(
    config: PretrainedConfig,
    start: str,
    layout: Layout,
    device: torch.device,
    *,
    frozen: bool = False,
) -> Backbone:
    """The network of the config's folder, sharded, with its tokens split and its blocks
    checkpointed, and compiled if the config says so. Without a folder, and in a synthetic run, it
    has random weights. A frozen one keeps them in the dtype of the computation.

    Raises:
        OptionError: the config has no folder, or the start is another run.
        RunError: the folder cannot be used.
    """
    if start != TEACHER:
        raise OptionError(
            f"the start of a network is {start!r}; networks of diffusers start from the teacher"
        )
    if config.model.folder is not None:
        with errors_on_every_rank():
            network = config.model.build_on_meta()
    elif config.synthetic:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = config.model.build()
            perturb(network)
        network.to(device)
    else:
        raise OptionError("the preset needs the folder of its model: --model.folder FOLDER")
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


def _load_data(folder: RunFolder, config: PretrainedConfig, network: Backbone) -> Latents:
    """The data set, checked against the network. Raises RunError."""
    shapes, settings = network.condition_shapes, config.data
    if settings.folder is None and config.synthetic:
        made = folder.path / SYNTHETIC_DATA
        settings = replace(settings, folder=str(made))
        with errors_on_every_rank():
            if folder.layout.is_main and not made.exists():
                sizes = settings.condition_sizes(shapes)
                write_random_latents(made, SYNTHETIC_SAMPLES, settings.sample_shape, sizes)
    with errors_on_every_rank():
        try:
            network.require_sample_shape(settings.sample_shape)
        except ValueError as error:
            raise OptionError(f"data.sample_shape does not fit the model: {error}") from error
        return settings.load(shapes, network.fixed_conditions)
