"""Steps that the ranks of a run take together: all of them go on, or all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from rcm.distributed.agreement import on_every_rank

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, or one process alone.

    They communicate in a gloo group of their own, so that a thread may do so while training
    communicates. Every process of the default group must create it, at the same point.

    Attributes:
        rank, size: of this process in the group, and of the group; 0 and 1 alone.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.rank, self.size = 0, 1
        if group is not None:
            self._group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def on_all(self, step: Callable[[], T]) -> list[T]:
        """The results of a step of all ranks, in their order.

        If it raises on some, the error of the lowest of these ranks is raised on all. The step must
        not communicate. Results and errors are pickled for the other ranks.

        Raises RuntimeError if a rank has died.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = step()
        except Exception as error:
            failure = error
        outcomes = [(result, failure)]
        if self.size > 1:
            outcomes *= self.size
            dist.all_gather_object(outcomes, (result, failure), group=self._group)
            outcomes[self.rank] = result, failure  # with its traceback
        for _, failure in outcomes:
            if failure is not None:
                raise on_every_rank(failure)
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def on_first(self, step: Callable[[], T]) -> T:
        """The result of a step of rank 0, on all ranks; errors are raised as in `on_all`."""
        return self.on_all(lambda: step() if self.rank == 0 else None)[0]  # type: ignore[return-value]
