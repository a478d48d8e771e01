"""`backend(name)` or JVP_ATTN_BACKEND chooses the backend; backward passes use the same one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jvp_attn
from jvp_attn import flash_attn_jvp
from jvp_attn.backends import select
from jvp_attn.backends.kernel_table import KERNELS
from tests.jvp_attn.attention_cases import Case


@pytest.fixture(autouse=True)
def fresh_extension_lookup() -> Iterator[None]:
    select._why_no_extension.cache_clear()
    select._why_no_cpu_extension.cache_clear()
    yield
    select._why_no_extension.cache_clear()
    select._why_no_cpu_extension.cache_clear()


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jvp_attn._C", None)


@pytest.fixture
def no_cpu_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jvp_attn._cpu", None)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CUDA extension that reports all kernels."""
    extension = SimpleNamespace(kernels=lambda: dict.fromkeys(KERNELS))
    monkeypatch.setitem(sys.modules, "jvp_attn._C", extension)
    monkeypatch.setitem(sys.modules, "jvp_attn._cpu", None)
    return extension


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Torch reports a CUDA device; its tensors are fake."""
    properties = {"capability": (8, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: properties["capability"])
    with FakeTensorMode():
        yield properties


def on_gpu(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Tensor:
    return torch.empty(2, 8, 2, head_dim, dtype=dtype, device="cuda:0")


def attention_of_q() -> tuple[Tensor, Tensor]:
    """Attention, and the q that requires grad."""
    data = Case().primals()
    q = data["q"].requires_grad_()
    return flash_attn_jvp(q, data["k"], data["v"]), q


def thrice_differentiated(out: Tensor, q: Tensor) -> Tensor:
    """Only the backend `math` has third derivatives."""
    y = (out**3).sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y, q, create_graph=True)
        y = y.square().sum()
    return y


@pytest.mark.usefixtures("no_extension", "no_cpu_extension")
def test_without_extensions_the_default_is_tiled() -> None:
    assert jvp_attn.current_backend() == "automatic"
    assert jvp_attn.available_backends() == ("tiled", "math")
    with pytest.raises(NotImplementedError):
        thrice_differentiated(*attention_of_q())


def test_the_backward_pass_uses_the_backend_of_its_forward_pass() -> None:
    with jvp_attn.backend("math"):
        by_math = attention_of_q()
    thrice_differentiated(*by_math)

    by_tiles = attention_of_q()
    with jvp_attn.backend("math"), pytest.raises(NotImplementedError):
        thrice_differentiated(*by_tiles)


def test_with_blocks_nest_and_end_on_an_exception() -> None:
    with jvp_attn.backend("math"):
        with jvp_attn.backend("tiled"):
            assert jvp_attn.current_backend() == "tiled"
        with pytest.raises(ZeroDivisionError), jvp_attn.backend("automatic"):
            raise ZeroDivisionError
        assert jvp_attn.current_backend() == "math"
    assert jvp_attn.current_backend() == "automatic"


def test_the_environment_variable_chooses_the_backend_outside_of_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JVP_ATTN_BACKEND", "math")
    assert jvp_attn.current_backend() == "math"
    thrice_differentiated(*attention_of_q())
    with jvp_attn.backend("tiled"), pytest.raises(NotImplementedError):
        thrice_differentiated(*attention_of_q())


def test_an_empty_environment_variable_keeps_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_BACKEND", "")
    assert jvp_attn.current_backend() == "automatic"


ALLOWED = "it must be one of automatic, tiled, math"


@pytest.mark.usefixtures("no_extension", "no_cpu_extension")
def test_an_unknown_backend_raises() -> None:
    with (
        pytest.raises(ValueError, match=f"backend is 'cuda9'; {ALLOWED}"),
        jvp_attn.backend("cuda9"),
    ):
        pass
    assert jvp_attn.current_backend() == "automatic"


@pytest.mark.usefixtures("no_extension", "no_cpu_extension")
def test_an_unknown_backend_in_the_environment_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_BACKEND", "cuda9")
    with pytest.raises(ValueError, match=f"variable JVP_ATTN_BACKEND is 'cuda9'; {ALLOWED}"):
        attention_of_q()


# ----------------------------------------------------------------------------
# The backend `cpu`


needs_cpu_extension = pytest.mark.skipif(
    "cpu" not in jvp_attn.available_backends(), reason="the CPU extension is not built"
)
ON_CPU = torch.zeros(2, 8, 2, 64)


@needs_cpu_extension
@pytest.mark.usefixtures("no_extension")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_on_a_cpu_the_default_is_the_cpu_kernels(dtype: torch.dtype) -> None:
    assert jvp_attn.available_backends() == ("tiled", "cpu", "math")
    assert select.resolve_backend(*3 * [ON_CPU.to(dtype)]) == "cpu"


@pytest.mark.usefixtures("no_cpu_extension")
def test_cpu_without_the_extension_raises_with_the_reason() -> None:
    assert select.resolve_backend(ON_CPU, ON_CPU, ON_CPU) == "tiled"
    message = r"math \(the CPU extension is not installed \(.*jvp_attn\._cpu.*\)\)"
    with pytest.raises(ValueError, match=message), jvp_attn.backend("cpu"):
        pass


@needs_cpu_extension
def test_cpu_raises_for_problems_it_cannot_compute() -> None:
    on_meta, too_long = ON_CPU.to("meta"), ON_CPU[:1, :1].expand(1, 2**30, 2, 64)
    assert select.resolve_backend(*3 * [on_meta]) == "tiled"
    assert select.resolve_backend(ON_CPU, too_long, too_long) == "tiled"
    with jvp_attn.backend("cpu"):
        with pytest.raises(ValueError, match=r"backend 'cpu' cannot .* q is on meta"):
            select.resolve_backend(*3 * [on_meta])
        with pytest.raises(
            ValueError, match="that of k is 1073741824; 'tiled' and 'automatic' can"
        ):
            select.resolve_backend(ON_CPU, too_long, too_long)


# ----------------------------------------------------------------------------
# The backend `cuda`


@pytest.mark.usefixtures("no_extension", "no_cpu_extension")
def test_cuda_without_the_extension_raises_with_the_reason() -> None:
    message = rf"{ALLOWED} \(the CUDA extension is not installed \(.*jvp_attn\._C.*\)\)"
    with pytest.raises(ValueError, match=message), jvp_attn.backend("cuda"):
        pass


def test_an_extension_of_another_version_is_not_used(extension: SimpleNamespace) -> None:
    extension.kernels = lambda: dict.fromkeys(set(KERNELS) - {"backward_dq_bf16_d64"})
    assert jvp_attn.available_backends() == ("tiled", "math")
    message = "not of this version .it has no kernel backward_dq_bf16_d64"
    with pytest.raises(ValueError, match=message), jvp_attn.backend("cuda"):
        pass


@pytest.mark.usefixtures("extension")
def test_on_a_gpu_the_default_in_half_precision_is_cuda(gpu: dict[str, Any]) -> None:
    assert jvp_attn.available_backends() == ("tiled", "cuda", "math")
    for dtype in (torch.bfloat16, torch.float16):
        assert select.resolve_backend(*3 * [on_gpu(dtype)]) == "cuda"
    for dtype in (torch.float32, torch.float64):
        assert select.resolve_backend(*3 * [on_gpu(dtype)]) == "tiled"
    wide = on_gpu(head_dim=257)
    assert select.resolve_backend(on_gpu(), on_gpu(), wide) == "tiled"
    assert select.resolve_backend(wide, wide, on_gpu()) == "tiled"
    gpu["capability"] = (7, 5)
    assert select.resolve_backend(*3 * [on_gpu()]) == "tiled"


@pytest.mark.usefixtures("no_extension", "gpu")
def test_on_a_gpu_without_the_extension_the_default_is_tiled() -> None:
    assert select.resolve_backend(*3 * [on_gpu()]) == "tiled"


@pytest.mark.usefixtures("extension")
def test_cuda_raises_for_problems_it_cannot_compute(gpu: dict[str, Any]) -> None:
    def reason(q: Tensor) -> str:
        raises = pytest.raises(ValueError, match="backend 'cuda' cannot compute this: ")
        with jvp_attn.backend("cuda"), raises as raised:
            select.resolve_backend(q, q, q)
        return str(raised.value)

    assert "q is on cpu" in reason(torch.zeros(2, 8, 2, 64))
    assert "and q has float32; 'tiled' and 'automatic' can" in reason(on_gpu(torch.float32))
    assert "head_dim 512 is above 256, the kernels' largest" in reason(on_gpu(head_dim=512))
    assert "head_dim is 0, and the kernels' smallest is 1" in reason(on_gpu(head_dim=0))
    gpu["capability"] = (7, 5)
    assert "the device has 7.5" in reason(on_gpu())


@pytest.mark.usefixtures("extension")
def test_attention_on_the_wrong_device_raises() -> None:
    with jvp_attn.backend("cuda"), pytest.raises(ValueError, match="q is on cpu"):
        attention_of_q()


def test_autograd_functions_raise_for_the_math_backend() -> None:
    options = jvp_attn.AttentionOptions(1.0, backend="math")
    with pytest.raises(ValueError, match="backend 'math' has no primitives"):
        jvp_attn.FlashAttention.apply(*Case().primals().values(), *4 * (None,), options)
