"""Transformers of diffusers, from a folder of their weights or from their settings."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch.torch_version import TorchVersion

from rcm.errors import RunError
from rcm.models.adapter import Adapter, Settings
from rcm.models.backbone import Backbone
from rcm.models.cosmos import COSMOS
from rcm.models.flux import FLUX
from rcm.models.sd3 import SD3
from rcm.models.wan import WAN
from rcm.validation import require_choice

Architecture = Literal["wan", "cosmos", "sd3", "flux"]
ADAPTERS: dict[Architecture, Adapter] = {"wan": WAN, "cosmos": COSMOS, "sd3": SD3, "flux": FLUX}
OLDEST_DIFFUSERS = "0.35"  # older ones keep rotary positions of Wan outside of its buffers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig:
    """A transformer of diffusers."""

    architecture: Architecture
    """Its class."""
    folder: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of its weights in diffusers' layout, or of a pipeline that has it in transformer/."""
    settings: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """Arguments of the class. Those of the folder must agree with them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What sharded training computes in. The trained weights are float32."""

    def __post_init__(self) -> None:
        require_choice(ADAPTERS, architecture=self.architecture)
        require_choice(DTYPES, dtype=self.dtype)
        if self.folder is not None and not isinstance(self.folder, str):
            raise TypeError(f"folder is {self.folder!r}; it must be a path")
        if not isinstance(self.settings, dict):
            raise TypeError(f"settings is {self.settings!r}; it must be a dict")
        object.__setattr__(self, "settings", _plain("settings", self.settings))
        if self.folder is None and not self.settings:
            raise ValueError("the model has neither a folder nor settings; give its folder")

    @property
    def adapter(self) -> Adapter:
        return ADAPTERS[self.architecture]

    def build(self) -> Backbone:
        """The network with new weights, drawn from torch's random state.

        Raises:
            RunError: the folder is not one of this model.
            ImportError: diffusers is missing or too old.
        """
        model_class = load_class(self.adapter.class_name)
        return self._backbone(model_class.from_config(self._all_settings(model_class)))

    def build_on_meta(self) -> Backbone:
        """The network on the meta device, without memory for its weights. Raises like `build`.

        `Backbone.remake_buffers` makes what the files of its weights do not contain.
        """
        with torch.device("meta"):
            return self.build()

    def model_folder(self) -> Path:
        """The folder with config.json and the weights.

        Raises:
            RunError: there is none.
        """
        if self.folder is None:
            raise RunError(f"the {self.architecture} model has no folder; its weights are needed")
        folder = Path(self.folder)
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder; give that of a {self.adapter.class_name}")
        if (folder / "config.json").is_file():
            return folder
        parts = [p.parent for p in sorted(folder.glob("transformer*/config.json"))]
        if not parts:
            raise RunError(
                f"{folder} has neither config.json nor transformer/config.json; give the folder "
                f"of a {self.adapter.class_name} or of its pipeline"
            )
        if len(parts) > 1:
            raise RunError(
                f"{folder} is a pipeline of {len(parts)} transformers; give the folder of one: "
                f"{' or '.join(str(part) for part in parts)}"
            )
        return parts[0]

    def _backbone(self, model: Any) -> Backbone:
        return Backbone(model, self.adapter, dtype=DTYPES[self.dtype])

    def _all_settings(self, model_class: Any) -> Settings:
        """The arguments of the class: the folder's if there is one, and the defaults."""
        parameters = inspect.signature(model_class.__init__).parameters
        unknown = self.settings.keys() - parameters.keys()
        if unknown:
            raise ValueError(
                f"settings has {', '.join(sorted(unknown))}, which {self.adapter.class_name} does "
                "not take"
            )
        if self.folder is None:
            return self.settings
        path = self.model_folder() / "config.json"
        stored = _read_json(path)
        name = stored.get("_class_name")
        if name != self.adapter.class_name:
            raise RunError(f"{path} is of a {name}; give the folder of a {self.adapter.class_name}")
        for key, expected in self.settings.items():
            found = _plain(key, stored.get(key, parameters[key].default))
            if found != expected:
                raise RunError(
                    f"{path} has {key} = {found!r}; this preset's model has {expected!r}"
                )
        return stored


def load_class(name: str) -> Any:
    """A class of diffusers.

    Raises:
        ImportError: diffusers is missing or too old.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"{name} needs diffusers, which cannot be imported ({error}); run "
            "pip install '.[diffusers]'"
        ) from error
    if TorchVersion(diffusers.__version__) < OLDEST_DIFFUSERS:
        raise ImportError(
            f"{name} needs diffusers {OLDEST_DIFFUSERS} or newer, but diffusers "
            f"{diffusers.__version__} is installed; run pip install --upgrade '.[diffusers]'"
        )
    try:
        return getattr(diffusers, name)
    except AttributeError as error:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no {name}; run "
            "pip install --upgrade '.[diffusers]'"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is not a JSON object; it is not a config.json of diffusers")
    return content


def _plain(name: str, value: Any) -> Any:
    """A setting with tuples for lists, so that it equals itself after a round trip through JSON."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(name, item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is {value!r}; settings are numbers, texts, lists and dicts of these")
