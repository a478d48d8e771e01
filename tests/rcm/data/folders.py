"""Small folders of latents in every layout, with samples that differ from each other."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rcm.data.samples import LATENTS, SampleShapes

SHAPES = SampleShapes((2, 3, 4, 5), {"text": (6, 7)})
COUNT, SAMPLES_PER_SHARD = 8, 3  # the last shard is shorter

Sample = dict[str, Tensor]


def random_samples(count: int = COUNT, shapes: SampleShapes = SHAPES) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.all().items()}
        for _ in range(count)
    ]


def stacked(samples: Sequence[Sample]) -> Sample:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def by_shard(samples: Sequence[Sample]) -> Iterable[tuple[str, Sequence[Sample]]]:
    for number, start in enumerate(range(0, len(samples), SAMPLES_PER_SHARD)):
        yield f"{number:02d}", samples[start : start + SAMPLES_PER_SHARD]


def write_safetensors(folder: Path, samples: Sequence[Sample]) -> None:
    for name, part in by_shard(samples):
        save_file(stacked(part), folder / f"{name}.safetensors")


def write_npz(folder: Path, samples: Sequence[Sample]) -> None:
    for name, part in by_shard(samples):
        np.savez(folder / f"{name}.npz", **{k: t.numpy() for k, t in stacked(part).items()})


def write_webdataset(folder: Path, samples: Sequence[Sample]) -> None:
    for name, part in by_shard(samples):
        members = {}
        for row, sample in enumerate(part):
            members |= members_of(f"{name}{row:02d}", sample)
        write_tar(folder / f"{name}.tar", members.items())


WRITERS: dict[str, Callable[[Path, Sequence[Sample]], None]] = {
    "safetensors": write_safetensors,
    "npz": write_npz,
    "tar": write_webdataset,
}


def members_of(key: str, sample: Sample, suffix: str = "pth") -> dict[str, bytes]:
    return {
        f"{key}.latent.{suffix}": saved(sample[LATENTS]),
        f"{key}.embed.{suffix}": saved(sample["text"]),
        f"{key}.prompt.txt": b"a prompt",
    }


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
