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

class KernelInfo(TypedDict):
    threads: int  # in a block
    shared_bytes: int  # likewise

class Limits(TypedDict):
    tma_alignment_bytes: int  # of addresses and strides, for compute capability 9.0
    tma_alignment_elements: int  # the same, and of head dims, in elements of 2 bytes
    dq_accum_row_multiple: int  # where the rows of each sequence begin in dq_accum

# Addresses are what torch.Tensor.data_ptr() gives, strides count elements.

class Tensor:
    def __init__(self, data: int, batch_stride: int, row_stride: int, head_stride: int) -> None: ...

class RowVector:
    def __init__(self, data: int, batch_stride: int, head_stride: int) -> None: ...

class Mask:
    def __init__(
        self,
        data: int,
        batch_stride: int,
        head_stride: int,
        row_stride: int,
        column_stride: int,
        kind: int,
        batch_size: int = ...,
        batch_group: int = ...,
    ) -> None: ...

class AttentionParams:
    """As in csrc/params.h."""

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor
    tk: Tensor
    tv: Tensor
    out: Tensor
    tout: Tensor
    out_lo: Tensor
    tout_lo: Tensor
    lse: RowVector
    mu: RowVector
    lse_lo: RowVector
    grad_out: Tensor
    grad_tout: Tensor
    grad_lse: RowVector
    grad_mu: RowVector
    beta: RowVector
    delta: RowVector
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_tq: Tensor
    grad_tk: Tensor
    grad_tv: Tensor
    dq_accum: RowVector
    ds_row_sums: RowVector
    mask: Mask
    cu_seqlens_q: int
    cu_seqlens_k: int
    seqused_k: int
    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    total_q: int
    total_k: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    causal: int

def build_info() -> BuildInfo: ...
def devices() -> list[Device]: ...
def device_error() -> str | None: ...
def driver_version() -> str | None: ...
def runtime_version() -> str: ...
def select_device(ordinal: int) -> None: ...
def kernels() -> dict[str, KernelInfo]: ...
def limits() -> Limits: ...
def launch(name: str, params: AttentionParams, stream: int) -> None: ...
