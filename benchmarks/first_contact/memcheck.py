"""Stage memcheck: a problem of each family of kernels, while compute-sanitizer watches the process.

A rehearsal runs the same problems without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# With an allocation for each tensor, memcheck knows its bounds. To be set before torch starts.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

from benchmarks.first_contact.case import Case
from benchmarks.first_contact.kernels import cases_of
from benchmarks.first_contact.settings import Settings


def cases(settings: Settings) -> Iterator[Case]:
    """The first problem of each family."""
    return cases_of(settings, each=1)
