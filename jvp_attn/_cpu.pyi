"""The CPU extension, as csrc/cpu/bindings.cpp defines it."""

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
        element: int,
        batch_size: int = ...,
        batch_group: int = ...,
    ) -> None: ...

class AttentionParams:
    """As in csrc/cpu/params.h."""

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
    lse_lo: RowVector
    lse: RowVector
    mu: RowVector
    grad_out: Tensor
    grad_tout: Tensor
    grad_lse: RowVector
    grad_mu: RowVector
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_tq: Tensor
    grad_tk: Tensor
    grad_tv: Tensor
    mask: Mask
    tmask: Mask
    grad_mask: Mask
    grad_tmask: Mask
    cu_seqlens_q: int  # an address
    cu_seqlens_k: int  # an address
    seqused_k: int  # an address; 0, the default, where all keys are used
    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    causal: int
    element: int
    threads: int

    def __init__(self) -> None: ...

def instruction_sets() -> list[str]: ...
def forward(params: AttentionParams, instruction_set: str) -> None: ...
def backward(params: AttentionParams, instruction_set: str) -> None: ...
