"""Compiling, exporting and tracing under `replace_sdpa`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp

import jvp_attn
from jvp_attn import flash_attn_with_tangent, replace_sdpa
from tests.jvp_attn.attention_cases import Tensors, assert_close, named, randn
from tests.jvp_attn.compile_cases import in_one_graph
from tests.jvp_attn.sdpa_callers import (
    HEAD_DIM,
    HEADS,
    MODULES,
    TOKENS,
    TTOKENS,
    TX,
    Function,
    X,
    by_torch,
    self_attention,
)


class SelfAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self_attention(x)


def jvp_and_gradient(f: Function, x: Tensor = X, tx: Tensor = TX) -> Any:
    x, tx = x.clone().requires_grad_(), tx.clone().requires_grad_()
    out, tangent = jvp(f, (x,), (tx,))
    return out, tangent, torch.autograd.grad((out**3 + tangent**3).sum(), (x, tx))


# ----------------------------------------------------------------------------
# torch.compile: methods of tensors that are Python code, which torch must not trace into


WINDOW = torch.ones(8, dtype=torch.float64)
SQUARE = randn(4, 4, seed="square") + 4 * torch.eye(4, dtype=torch.float64)
METHODS: dict[str, Callable[[Tensor], Any]] = {
    "__contains__": lambda x: x + (1.0 in x),
    "__floordiv__": lambda x: x // 2,
    "__iter__": lambda x: sum(y.sin() for y in x),
    "__len__": lambda x: x * len(x),
    "__pow__": lambda x: x**3,
    "__rfloordiv__": lambda x: 2 // x,
    "__rlshift__": lambda x: 2 << x.abs().long(),
    "__rmatmul__": lambda x: x.__rmatmul__(x),
    "__rmod__": lambda x: 2 % x,
    "__rpow__": lambda x: 2**x,
    "__rrshift__": lambda x: 9 >> x.abs().long(),
    "__rsub__": lambda x: 1 - x,
    "__rtruediv__": lambda x: 1 / x,
    "dim_order": lambda x: x * x.dim_order()[1],
    "istft": lambda x: (
        x.flatten().stft(8, window=WINDOW, return_complex=True).istft(8, window=WINDOW)
    ),
    "lu": lambda x: x.lu(),
    "norm": lambda x: x.norm(dim=-1),
    "resize": lambda x: x.resize(2, 8),
    "resize_as": lambda x: x.resize_as(x),
    "split": lambda x: x.split(2),
    "stft": lambda x: x.flatten().stft(8, window=WINDOW, return_complex=True).abs(),
    "unflatten": lambda x: x.unflatten(-1, (2, 2)),
    "unique": lambda x: x.round().unique(),
    "unique_consecutive": lambda x: x.round().unique_consecutive(),
}


@pytest.mark.filterwarnings("ignore:non-inplace resize", "ignore:torch.lu is deprecated")
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_tensors_compile_inside(method: str, fresh_compiler: None) -> None:
    weight = nn.Parameter(SQUARE.mT)

    def f(x: Tensor) -> Any:
        return [METHODS[method](y) for y in (x, x.sin(), weight)], self_attention(x[None])

    with replace_sdpa():
        compiled = torch.compile(f, backend="eager", fullgraph=True)
        assert_close(named(compiled(SQUARE)), named(f(SQUARE)), tolerance=0)


def attention_of_split_heads(x: Tensor, tx: Tensor) -> Tensors:
    def attention(x: Tensor) -> Tensor:
        return self_attention(x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2))

    return jvp(attention, (x,), (tx,))


@pytest.mark.parametrize("first_inside", [True, False])
def test_a_compiled_method_may_be_called_on_both_sides(
    first_inside: bool, fresh_compiler: None
) -> None:
    expected = named(by_torch(attention_of_split_heads, TOKENS, TTOKENS))
    compiled = in_one_graph(attention_of_split_heads)

    def inside() -> None:
        with replace_sdpa():
            assert_close(named(compiled(TOKENS, TTOKENS)), expected)

    def outside() -> None:
        with pytest.raises(Exception, match="_scaled_dot_product_flash_attention"):
            compiled(TOKENS, TTOKENS)

    for side in (inside, outside, inside) if first_inside else (outside, inside, outside):
        side()


class Doubling(nn.Parameter):
    def unflatten(self, dim: Any, sizes: Any) -> Any:  # type: ignore[override]
        return 2 * super().unflatten(dim, sizes)


def test_a_method_that_a_subclass_overrides_compiles_as_outside(fresh_compiler: None) -> None:
    """Torch 2.15 computes the wrong value outside: twice too large."""
    x = Doubling(SQUARE)
    compiled = torch.compile(METHODS["unflatten"], backend="eager")
    expected = compiled(x)
    with replace_sdpa():
        assert torch.equal(compiled(x), expected)


# ----------------------------------------------------------------------------
# torch.export


@pytest.fixture
def exported(request: pytest.FixtureRequest) -> Iterator[torch.export.ExportedProgram]:
    with replace_sdpa():
        yield torch.export.export(SelfAttention(), (X,), strict=request.param)


@pytest.mark.parametrize("exported", [True, False], ids=["strict", "non-strict"], indirect=True)
def test_an_exported_module_has_tangents_and_gradients(
    exported: torch.export.ExportedProgram,
) -> None:
    actual = named(jvp_and_gradient(exported.module()))
    assert_close(actual, named(by_torch(jvp_and_gradient, self_attention)))


@pytest.mark.parametrize("exported", [False], indirect=True)
def test_an_exported_module_can_be_saved_and_compiled(
    exported: torch.export.ExportedProgram,
) -> None:
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    expected = named(by_torch(jvp, self_attention, (X,), (TX,)))
    assert_close(named(jvp(loaded, (X,), (TX,))), expected)
    compiled = in_one_graph(lambda x, tx: jvp(loaded, (x,), (tx,)))
    assert_close(named(compiled(X, TX)), expected)


def test_an_export_may_have_varying_sizes_and_a_jvp_inside() -> None:
    class Jvp(nn.Module):
        def forward(self, x: Tensor, tx: Tensor) -> Tensors:
            return jvp(self_attention, (x,), (tx,))

    batch, seqlen = torch.export.Dim("batch"), torch.export.Dim("seqlen", min=2, max=4096)
    with replace_sdpa():
        shapes = {"x": {0: batch, 2: seqlen}}
        of_any_size = torch.export.export(SelfAttention(), (X,), dynamic_shapes=shapes).module()
        of_jvp = torch.export.export(Jvp(), (X, TX)).module()
    x, tx = randn(3, 4, 9, 3, seed="other x"), randn(3, 4, 9, 3, seed="other tx")
    actual = named(jvp_and_gradient(of_any_size, x, tx))
    assert_close(actual, named(by_torch(jvp_and_gradient, self_attention, x, tx)))
    assert_close(named(of_jvp(X, TX)), named(by_torch(jvp, self_attention, (X,), (TX,))))


# ----------------------------------------------------------------------------
# torch.fx.symbolic_trace


class SomeAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(query=x, key=x.sin(), value=x.cos(), is_causal=True)
        return y + torch.ops.aten.scaled_dot_product_attention(x, x.cos(), y, scale=0.3)


def test_a_symbolic_trace_contains_the_attention_of_this_package() -> None:
    module = SomeAttention()
    with replace_sdpa():
        graph = torch.fx.symbolic_trace(module)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(jvp_attn.scaled_dot_product_attention) == 2
    actual = named(jvp_and_gradient(graph))
    assert_close(actual, named(by_torch(jvp_and_gradient, module)))


def test_a_symbolic_trace_contains_multi_head_attention() -> None:
    attention, _ = MODULES["MultiheadAttention"]

    class TracesIntoModules(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return False

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            inner = self.attention
            return F.multi_head_attention_forward(
                *(x, x.sin(), x.cos(), inner.embed_dim, inner.num_heads),
                *(inner.in_proj_weight, inner.in_proj_bias, None, None, False, 0.0),
                *(inner.out_proj.weight, inner.out_proj.bias),
                need_weights=False,
            )[0]

    module = Projected()
    with replace_sdpa():
        graph = torch.fx.GraphModule(module, TracesIntoModules().trace(module))
    actual = named(jvp(graph, (TOKENS,), (TTOKENS,)))
    assert_close(actual, named(by_torch(jvp, module, (TOKENS,), (TTOKENS,))))


# ----------------------------------------------------------------------------
# TorchScript


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.* is (deprecated|not supported)", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize(
    "attention",
    [
        self_attention,
        lambda x: jvp_attn.flash_attn_jvp(x, x, x),
        lambda x: flash_attn_with_tangent(x, x, x, x),
        lambda x: jvp_attn.flash_attn_varlen_jvp(
            *3 * [x[0]], *2 * [torch.tensor([0, 4], dtype=torch.int32)], 4, 4
        ),
    ],
    ids=["replace_sdpa", "flash_attn_jvp", "flash_attn_with_tangent", "flash_attn_varlen_jvp"],
)
@pytest.mark.parametrize("backend", ["automatic", "math"])
def test_jit_trace_raises(attention: Function, backend: str) -> None:
    with (
        replace_sdpa(),
        jvp_attn.backend(backend),
        pytest.raises(NotImplementedError, match=r"torch\.jit\.trace .* use torch\.export"),
    ):
        torch.jit.trace(attention, X)


class ScriptableAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x.sin(), x.cos())


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is (deprecated|not supported)")
def test_a_tangent_raises_in_a_script() -> None:
    with replace_sdpa():
        script = torch.jit.script(ScriptableAttention())
        assert_close({"out": script(X)}, {"out": by_torch(self_attention, X)})
        with pytest.raises(NotImplementedError, match="forward AD"):
            jvp(script, (X,), (TX,))
