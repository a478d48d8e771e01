"""An extension without kernels, for tests: it records the launches and computes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jvp_attn.backends.kernel_table import KERNELS

STREAM = 77


class Params:
    """The parameters of a launch."""


class Recorder:
    """Stands in for `jvp_attn._C` and for the selection of device and stream.

    Args:
        compiled: the kernels that it reports as compiled.

    Attributes:
        launches: (kernel, fields, stream) of each launch. A tensor is (address, strides), a mask
            (address, strides, kind, batch size, batch group).
        streams_of: the devices whose stream was requested.
    """

    AttentionParams = Params

    def __init__(self, compiled: Collection[str] = tuple(KERNELS)) -> None:
        self._compiled = compiled
        self.launches: list[tuple[str, dict[str, Any], int]] = []
        self.streams_of: list[torch.device] = []

    def kernels(self) -> dict[str, None]:
        return dict.fromkeys(self._compiled)

    def limits(self) -> dict[str, int]:
        return {
            "tma_alignment_bytes": 16,
            "tma_alignment_elements": 8,
            "dq_accum_row_multiple": 128,
        }

    def Tensor(self, *address_and_strides: int) -> tuple[int, ...]:
        assert len(address_and_strides) == 4
        return address_and_strides

    def RowVector(self, *address_and_strides: int) -> tuple[int, ...]:
        assert len(address_and_strides) == 3
        return address_and_strides

    def Mask(self, *address_strides_kind_and_batch: int) -> tuple[int, ...]:
        assert len(address_strides_kind_and_batch) == 8
        return address_strides_kind_and_batch

    def launch(self, name: str, params: Params, stream: int) -> None:
        self.launches.append((name, dict(vars(params)), stream))

    @contextmanager
    def stream_of(self, device: torch.device) -> Iterator[int]:
        self.streams_of.append(device)
        yield STREAM

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.launches]

    @property
    def steps(self) -> list[str]:
        """The launched kernels without dtype and head dim."""
        return [name.partition("_bf16")[0] for name in self.names]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the last launch."""
        return self.launches[-1][1]
