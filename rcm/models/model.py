"""What training needs of a model: a config that builds it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """Settings of a network; the base class of each network's own config."""

    optional_parts: ClassVar[tuple[str, ...]] = ("null_class", "guidance_input")
    """Settings that add a part without effect at first, so that weights without it can be used."""

    initial: ClassVar[tuple[str, ...]] = ()
    """Settings of the first weights alone, which other weights replace."""

    null_class: bool = False
    """Add a label that means no label, for classifier-free guidance."""
    guidance_input: bool = False
    """Take the guidance scale and its interval as inputs (iMF)."""

    def differences(self, other: "ModelConfig") -> list[str]:
        """The settings without which the weights of another network compute something else."""
        if type(other) is not type(self):
            return [f"{type(other).__name__} there, {type(self).__name__} here"]
        return [
            f"model.{field.name} = {there} there, {here} here"
            for field in fields(self)
            if field.name not in (*self.optional_parts, *self.initial)
            and (there := getattr(other, field.name)) != (here := getattr(self, field.name))
        ]

    @abstractmethod
    def build(self, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
        """A TrigFlow network with new weights, for samples of that shape and integer labels.

        Its forward is `net(x, t, labels, end=None) -> F` (see rcm.trigflow.Network). It may have
        the attributes `log_weight`, a module for sCM's w(t), and `heads`, a function of the same
        arguments that returns F and a velocity; each may be None.
        """
