"""The command that runs a stage under compute-sanitizer."""

from __future__ import annotations

from benchmarks.first_contact.supervisor import SANITIZER_ERRORS
from tests.gpu.sanitize import find_sanitizer


def sanitizer_command() -> list[str]:
    """compute-sanitizer with its options; empty if it is not installed."""
    try:
        found = find_sanitizer()
    except SystemExit:
        return []
    # torch calls functions of CUDA that fail, and handles that: these are no errors.
    quiet = ("--report-api-errors", "no")
    return [str(found), "--tool", "memcheck", *quiet, "--error-exitcode", str(SANITIZER_ERRORS)]
