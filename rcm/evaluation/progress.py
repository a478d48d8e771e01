"""A progress bar of network evaluations, while samples are drawn and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from tqdm import tqdm

from rcm.trigflow import Network

Counted = Callable[[Network], Network]


@contextmanager
def evaluations_shown(title: str, total: int, *, shown: bool = True) -> Iterator[Counted]:
    """Inside, a bar counts the samples that networks evaluate: those that Counted returns.

    The bar appears after two seconds, on a terminal only, and vanishes at the end.
    """
    with tqdm(
        desc=title,
        total=total,
        unit=" evaluations",
        unit_scale=True,
        leave=False,
        delay=2,
        disable=None if shown else True,
    ) as bar:

        def counted(network: Network) -> Network:
            def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                result = network(x, *args, **kwargs)
                bar.update(len(x))
                return result

            return call

        yield counted
