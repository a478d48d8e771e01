"""The CUDA extension, as csrc/bindings.cpp defines it."""

from typing import TypedDict

class BuildInfo(TypedDict):
    archs: list[str]  # "sm_90a" is machine code for one GPU generation, "compute_90" is PTX
    nvcc: str
    compiler: str
    git_hash: str  # "unknown" in a build from an sdist

class Device(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int  # bytes
    shared_memory_per_block: int  # bytes, what a kernel may ask for at most (opt-in)

def build_info() -> BuildInfo: ...
def devices() -> list[Device]: ...
def device_error() -> str | None: ...
def driver_version() -> str | None: ...
def runtime_version() -> str: ...
