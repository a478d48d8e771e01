"""A run: everything from its settings to its last checkpoint, in a folder that can be continued."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.layout import Layout
from rcm.distributed.processes import processes
from rcm.errors import RunError
from rcm.presets import config_from_settings
from rcm.run_from_scratch import run_from_scratch
from rcm.run_pretrained import open_inputs, run_pretrained
from rcm.training.collapse import CollapseError, OnCollapse
from rcm.training.config import FromScratchConfig, PretrainedConfig, RunConfig
from rcm.training.files import readable, write_atomically
from rcm.training.resources import require_fitting_model
from rcm.training.reuse import weights_of_other_runs
from rcm.training.run_folder import RunFolder, open_run_folder


def run(path: Path, config: RunConfig, on_collapse: OnCollapse = "stop") -> None:
    """Do what is left of a run, on this rank.

    Raises:
        OptionError: the machine lacks the device or the memory, the folder cannot be used, or the
            mesh does not fit the ranks or the batch.
        RunError: it cannot start or continue, or the student collapsed; the message says what to
            do.
    """
    torch.set_num_threads(config.threads)
    # Nothing in rcm changes a network's output in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    needs_group = isinstance(config, PretrainedConfig)
    with processes(config.device, always_group=needs_group) as ranks:
        with errors_on_every_rank():
            config.mesh.sizes(ranks.size)
        layout = Layout(config.mesh, ranks.device.type)
        borrowed: dict[str, bytes] = {}
        inputs, data = None, None
        # What can be wrong with the settings is found before the folder exists.
        with errors_on_every_rank():
            for method in config.phases():
                layout.positions(method.batch, config.accumulation, name=f"--{method.result}.batch")
            if isinstance(config, PretrainedConfig):
                with readable():
                    inputs = open_inputs(config)
            elif isinstance(config, FromScratchConfig):
                data = config.load_data()
                if layout.is_main:
                    require_fitting_model(config, data.facts)
                    borrowed = weights_of_other_runs(
                        config,
                        path,
                        data.facts,
                        build=partial(config.build_network, data.facts),
                        read_config=config_from_settings,
                    )
        with open_run_folder(path, config, layout) as folder, _explained(folder):
            with errors_on_every_rank():
                for name, content in borrowed.items():
                    write_atomically(path / name, content)
            if isinstance(config, FromScratchConfig) and data is not None:
                run_from_scratch(folder, config, data, ranks.device, on_collapse)
            elif isinstance(config, PretrainedConfig):
                run_pretrained(folder, config, ranks.device, inputs)


@contextmanager
def _explained(folder: RunFolder) -> Iterator[None]:
    """Say where the last checkpoint is when a run stops."""
    try:
        yield
    except CollapseError:
        raise
    except RunError as error:
        raise RunError(f"{error}; {folder.describe_last_checkpoint()}") from error
    except OSError as error:
        raise RunError(
            f"a file cannot be read or written: {error}. Free some space or repair the file system "
            f"and repeat the command; {folder.describe_last_checkpoint()}"
        ) from error
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(folder.describe_last_checkpoint())
        raise
