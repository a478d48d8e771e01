"""The folder of a pretrained diffusers network: config.json and safetensors files.

The weights are in diffusion_pytorch_model.safetensors, or in several files that
diffusion_pytorch_model.safetensors.index.json lists. The folder of a pipeline is accepted too; its
network is in transformer/. Files with pickled weights (.bin, .pt) are never read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcm.distributed.stored_tensors import StoredTensor, stored_tensors
from rcm.errors import RunError

CONFIG, SUBFOLDER = "config.json", "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@dataclass(frozen=True)
class PretrainedFolder:
    """A network on disk, of which only the config has been read."""

    path: Path
    config: dict[str, Any]
    """Settings of the network, and its class as "_class_name"."""

    @classmethod
    def open(cls, folder: str | Path) -> PretrainedFolder:
        """Find the network in a folder, or in the folder of a pipeline.

        Raises:
            RunError: there is no folder, or no config of a network in it.
            OSError: the config cannot be read.
        """
        path = Path(folder)
        if not path.is_dir():
            raise RunError(f"there is no folder {path}; expected that of a pretrained network")
        if not (path / CONFIG).is_file():
            if not (path / SUBFOLDER / CONFIG).is_file():
                raise RunError(
                    f"{path} holds no network: neither {CONFIG} nor {SUBFOLDER}/{CONFIG} exists"
                )
            path = path / SUBFOLDER
        config = _read_json(path / CONFIG)
        if not isinstance(config.get("_class_name"), str):
            raise RunError(f'{path / CONFIG} names no class; expected "_class_name"')
        return cls(path, config)

    def require_class(self, *names: str) -> None:
        """Raise RunError unless the network is of one of the classes."""
        if (name := self.config["_class_name"]) not in names:
            raise RunError(f"{self.path} holds a {name}; expected a {names[0]}")

    def tensors(self) -> dict[str, StoredTensor]:
        """All weights, by name; reads the headers of the files.

        Raises:
            RunError: weights are missing or in another format, a file that the index lists is
                missing, or a file is damaged, truncated or does not fit the index.
            OSError: a file cannot be read.
        """
        if (self.path / INDEX).is_file():
            return self._indexed_tensors()
        if (self.path / WEIGHTS).is_file():
            return stored_tensors(self.path / WEIGHTS)
        raise RunError(f"{self.path} has no {WEIGHTS} and no {INDEX}; {self._what_it_has()}")

    def _indexed_tensors(self) -> dict[str, StoredTensor]:
        index = self.path / INDEX
        file_of = _read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not file_of:
            raise RunError(f'{index} is damaged: "weight_map" lists no files')
        files = sorted(set(map(str, file_of.values())))
        for name in files:
            if Path(name).name != name:
                raise RunError(f"{index} names {name!r}; expected a file of the same folder")
        if missing := [name for name in files if not (self.path / name).is_file()]:
            raise RunError(
                f"{len(missing)} of {len(files)} files that {index} lists are missing: "
                f"{listing(missing)}"
            )
        tensors: dict[str, StoredTensor] = {}
        for name in files:
            found = stored_tensors(self.path / name)
            listed = {tensor for tensor, file in file_of.items() if file == name}
            if different := sorted(found.keys() ^ listed):
                raise RunError(
                    f"{self.path / name} does not fit {index}, which lists other tensors for it: "
                    f"{listing(different)}"
                )
            tensors |= found
        return tensors

    def _what_it_has(self) -> str:
        names = sorted(path.name for path in self.path.iterdir() if path.is_file())
        if others := [name for name in names if ".safetensors" in name]:
            return (
                f"it has only {listing(others)}. Files of a variant, such as fp16, are not read: "
                "use the folder of the original weights"
            )
        if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
            return (
                f"it has only {listing(pickled)}. Pickled weights are not loaded, because they can "
                "run code: convert them to safetensors"
            )
        return "the folder holds no weights"


def listing(names: list[str], shown: int = 3) -> str:
    """The first few names."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: expected a JSON object")
    return content
