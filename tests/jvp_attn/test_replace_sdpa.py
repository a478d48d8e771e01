"""Inside `replace_sdpa()`, whatever calls torch's attention gets this package's, or an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import CheckpointError, checkpoint

import jvp_attn
from jvp_attn import replace_sdpa
from jvp_attn.backends import tiled
from tests.jvp_attn.attention_cases import (
    Tensors,
    assert_close,
    named,
    peak_and_largest_allocation,
    randn,
)

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 5, 4, 3
WIDTH = HEADS * HEAD_DIM

Function = Callable[[Tensor], Tensor]


def self_attention(x: Tensor, **options: Any) -> Tensor:
    """(batch, heads, seqlen, head_dim) → the same."""
    return F.scaled_dot_product_attention(x, x.sin(), x.cos(), **options)


def point_and_direction(*shape: int) -> Tensors:
    return randn(*shape, seed="x"), randn(*shape, seed="tx")


X, TX = point_and_direction(BATCH, HEADS, SEQLEN, HEAD_DIM)
TOKENS, TTOKENS = point_and_direction(BATCH, SEQLEN, WIDTH)


def of_torch(of: Callable[..., Any], *args: Any) -> Any:
    """What the backend of torch gives that has all derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return of(*args)


def counted(f: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    """The function, which adds to a list whenever it is called."""

    def counting(*args: Any) -> Any:
        calls.append(None)
        return f(*args)

    return counting


def tangent_is_refused(f: Function = self_attention) -> bool:
    """Whether torch computes attention itself: its fused backends have no forward derivative."""
    try:
        jvp(f, (X,), (TX,))
    except NotImplementedError as error:
        if "_scaled_dot_product_flash_attention" not in str(error):
            raise
        return True
    return False


# ----------------------------------------------------------------------------
# Where it holds


def test_only_inside_the_block() -> None:
    assert tangent_is_refused()
    with replace_sdpa():
        assert not tangent_is_refused()
    assert tangent_is_refused()


def test_not_after_an_exception() -> None:
    with pytest.raises(KeyError), replace_sdpa():
        raise KeyError
    assert tangent_is_refused()


def test_blocks_can_be_nested() -> None:
    with replace_sdpa():
        with replace_sdpa():
            assert not tangent_is_refused()
            assert not tangent_is_refused(
                lambda x: torch.ops.aten.scaled_dot_product_attention(x, x, x)
            )
        assert not tangent_is_refused()
    assert tangent_is_refused()


def test_not_in_other_threads() -> None:
    refused = []

    def run() -> None:
        refused.append(tangent_is_refused())

    with replace_sdpa():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert refused == [True]


@pytest.mark.parametrize(
    "attention",
    [
        self_attention,
        lambda x: torch.ops.aten.scaled_dot_product_attention(x, x.sin(), x.cos()),
        lambda x: torch.ops.aten.scaled_dot_product_attention.default(x, x.sin(), x.cos()),
    ],
    ids=["functional", "operator", "overload"],
)
def test_attention_is_that_of_this_package(attention: Function) -> None:
    with replace_sdpa():
        actual = attention(X)
    expected = jvp_attn.scaled_dot_product_attention(X, X.sin(), X.cos())
    assert torch.equal(actual, expected)


def test_backends_that_torch_is_told_to_use_are_ignored() -> None:
    with replace_sdpa(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not tangent_is_refused()


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: jvp(f, (X,), (TX,)),
    "grad": lambda f: grad(lambda x: (f(x) ** 3).sum())(X),
    "jvp of grad": lambda f: jvp(grad(lambda x: (f(x) ** 3).sum()), (X,), (TX,)),
    "grad of jvp": lambda f: grad(lambda x: (jvp(f, (x,), (TX,))[1] ** 3).sum())(X),
    "vmap of jvp": lambda f: vmap(lambda tx: jvp(f, (X,), (tx,))[1])(torch.stack([TX, X])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_inside_and_outside(transform: str) -> None:
    derivative = TRANSFORMS[transform]

    def entering(x: Tensor) -> Tensor:
        with replace_sdpa():
            return self_attention(x)

    expected = named(of_torch(derivative, self_attention))
    with replace_sdpa():
        assert_close(named(derivative(self_attention)), expected)
    assert_close(named(derivative(entering)), expected)


def test_what_was_computed_inside_has_its_derivatives_outside() -> None:
    def outputs_and_gradient(around: Any) -> Any:
        x = X.clone().requires_grad_()
        with around:
            out, tangent = jvp(self_attention, (x,), (TX,))
        return out, tangent, torch.autograd.grad((out * tangent).sum(), x)

    actual = named(outputs_and_gradient(replace_sdpa()))
    assert_close(actual, named(outputs_and_gradient(sdpa_kernel(SDPBackend.MATH))))


# ----------------------------------------------------------------------------
# Modules of torch

MODULES: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = {
    "MultiheadAttention": (
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda module, x: module(x, x.sin(), x.cos(), need_weights=False)[0],
    ),
    "MultiheadAttention, causal": (
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda module, x: module(
            *(x, x, x),
            attn_mask=nn.Transformer.generate_square_subsequent_mask(SEQLEN, dtype=x.dtype),
            is_causal=True,
            need_weights=False,
        )[0],
    ),
    "TransformerEncoderLayer": (
        nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.5, batch_first=True),
        lambda module, x: module(x),
    ),
    "TransformerDecoderLayer": (
        nn.TransformerDecoderLayer(WIDTH, HEADS, 8, dropout=0.5, batch_first=True),
        lambda module, x: module(x, x.sin()),
    ),
    "TransformerEncoder, padded": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.5, batch_first=True), 1
        ),
        lambda module, x: module(
            x, src_key_padding_mask=torch.arange(SEQLEN) >= torch.tensor([[SEQLEN], [SEQLEN - 2]])
        ),
    ),
}
for module, _ in MODULES.values():
    module.eval().double()
    for name, weight in module.named_parameters():
        weight.data = randn(*weight.shape, seed=name)


@contextmanager
def not_fused() -> Iterator[None]:
    """Let the layers of torch.nn.Transformer call functions that have derivatives."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("what", MODULES)
def test_modules_of_torch(what: str) -> None:
    module, call = MODULES[what]
    weights = list(module.parameters())

    def outputs_and_gradients() -> Any:
        outputs = jvp(partial(call, module), (TOKENS,), (TTOKENS,))
        return outputs, torch.autograd.grad(sum(x.pow(3).sum() for x in outputs), weights)

    with replace_sdpa():
        actual = outputs_and_gradients()
    assert_close(named(actual), named(of_torch(outputs_and_gradients)))


@pytest.mark.parametrize("what", MODULES)
def test_modules_of_torch_do_not_take_their_fused_paths(what: str) -> None:
    module, call = MODULES[what]
    with torch.no_grad():
        with replace_sdpa():
            actual = jvp(partial(call, module), (TOKENS,), (TTOKENS,))
        with not_fused():
            expected = of_torch(jvp, partial(call, module), (TOKENS,), (TTOKENS,))
    assert_close(named(actual), named(expected))


@pytest.mark.parametrize(
    "modes",
    [
        (replace_sdpa, replace_sdpa),
        (partial(torch.device, "cpu"), replace_sdpa),
        (replace_sdpa, partial(torch.device, "cpu")),
    ],
    ids=["itself", "inside", "around"],
)
def test_modules_of_torch_and_other_modes(modes: tuple[Any, Any]) -> None:
    """Such as that of `torch.set_default_device`."""
    module, call = MODULES["MultiheadAttention"]
    outer, inner = modes
    with outer(), inner():
        actual = jvp(partial(call, module), (TOKENS,), (TTOKENS,))
    assert_close(named(actual), named(of_torch(jvp, partial(call, module), (TOKENS,), (TTOKENS,))))


def test_attention_of_modules_is_that_of_this_package() -> None:
    module, _ = MODULES["MultiheadAttention"]
    x = torch.zeros(1, 1024, WIDTH, dtype=torch.float64)
    scores = HEADS * x.shape[1] ** 2 * x.element_size()

    def largest() -> int:
        with torch.no_grad():
            return peak_and_largest_allocation(lambda: module(x, x, x, need_weights=False))[1]

    assert of_torch(largest) >= scores
    with replace_sdpa():
        assert largest() < scores / 4


# ----------------------------------------------------------------------------
# Checkpoints and the compiler

BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Tensor.backward": lambda y, x: y.backward() or x.grad,
    "autograd.backward": lambda y, x: torch.autograd.backward(y) or x.grad,
    "autograd.grad": lambda y, x: torch.autograd.grad(y, x)[0],
}


def gradient_through_checkpoints(
    x: Tensor,
    *,
    forward_in: Any,
    backward_in: Any,
    backward: str = "Tensor.backward",
    use_reentrant: bool = False,
) -> dict[str, Tensor]:
    def block(x: Tensor) -> Tensor:
        return self_attention(x.sin(), is_causal=True).cos()

    x = x.clone().requires_grad_()
    with forward_in:
        y = x
        for _ in range(2):
            y = checkpoint(block, y, use_reentrant=use_reentrant)
    with backward_in:
        return {"grad": BACKWARDS[backward]((y**3).sum(), x)}


@pytest.mark.parametrize(
    ("backward", "use_reentrant"),
    [*((backward, False) for backward in BACKWARDS), ("Tensor.backward", True)],
)
def test_backward_inside_computes_checkpoints_anew_with_the_same_attention(
    backward: str, use_reentrant: bool
) -> None:
    gradient = partial(
        gradient_through_checkpoints,
        *(X,),
        forward_in=nullcontext(),
        backward_in=nullcontext(),
        backward=backward,
        use_reentrant=use_reentrant,
    )
    calls = []
    counting = mock.patch.object(tiled, "forward", counted(tiled.forward, calls))
    with jvp_attn.backend("tiled"), replace_sdpa(), counting:
        actual = gradient()
    assert len(calls) == 4
    assert_close(actual, of_torch(gradient))


@pytest.mark.parametrize("heads", [HEADS, SEQLEN])
@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_checkpoints_across_the_border_raise(inside: str, heads: int) -> None:
    """For torch would save other tensors; also where they happen to have the same shapes."""
    around = {
        "forward_in": nullcontext() if inside == "backward" else replace_sdpa(),
        "backward_in": replace_sdpa() if inside == "backward" else nullcontext(),
    }
    x = randn(BATCH, heads, SEQLEN, SEQLEN, seed="x")
    with pytest.raises(CheckpointError):
        gradient_through_checkpoints(x, **around)


def test_reentrant_checkpoints_across_the_border_have_the_gradient_of_torchs_attention() -> None:
    inside, outside = (
        gradient_through_checkpoints(
            X, forward_in=around, backward_in=nullcontext(), use_reentrant=True
        )
        for around in (replace_sdpa(), nullcontext())
    )
    assert_close(inside, outside)


def jvp_of_module(x: Tensor, tx: Tensor) -> Tensors:
    module, call = MODULES["MultiheadAttention"]
    return jvp(lambda x: self_attention(call(module, x)[:, None]), (x,), (tx,))


def test_compiled_inside() -> None:
    compiled = torch.compile(jvp_of_module, fullgraph=True, backend="aot_eager")
    expected = of_torch(jvp_of_module, TOKENS, TTOKENS)
    with replace_sdpa():
        assert_close(named(compiled(TOKENS, TTOKENS)), named(expected))
    with pytest.raises(Exception, match="_scaled_dot_product_flash_attention"):
        compiled(TOKENS, TTOKENS)


def test_entered_by_what_is_compiled() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, tx: Tensor) -> Tensors:
        with replace_sdpa():
            return jvp_of_module(x, tx)

    expected = of_torch(jvp_of_module, TOKENS, TTOKENS)
    assert_close(named(compiled(TOKENS, TTOKENS)), named(expected))


# ----------------------------------------------------------------------------
# What is refused


@pytest.fixture(scope="module")
def operators_of_another_package() -> Iterator[Any]:
    with torch.library._scoped_library("another_package", "FRAGMENT") as library:
        for name in ("flash_attn_forward", "flash_attn_backward", "norm"):
            library.define(f"{name}(Tensor x) -> Tensor")
            library.impl(name, Tensor.clone, "CPU")
        yield torch.ops.another_package


LENGTHS = torch.tensor([0, SEQLEN], dtype=torch.int32)
REFUSED: dict[str, Callable[[Any], Any]] = {
    "flex_attention": lambda ops: flex_attention(X, X, X),
    "varlen_attn": lambda ops: varlen_attn(*3 * [X[0].mT], LENGTHS, LENGTHS, SEQLEN, SEQLEN),
    "_scaled_dot_product_flash_attention_for_cpu": (
        lambda ops: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(X, X, X)
    ),
    "another_package.flash_attn_forward": lambda ops: ops.flash_attn_forward(X),
    "another_package.flash_attn_forward.default": lambda ops: ops.flash_attn_forward.default(X),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused(name: str, operators_of_another_package: Any) -> None:
    with replace_sdpa(), pytest.raises(Exception, match=r"inside replace_sdpa\(\)") as raised:
        REFUSED[name](operators_of_another_package)
    assert name.removesuffix("_attn") in str(raised.value)


def test_what_is_no_attention_or_has_derivatives_is_not_refused(
    operators_of_another_package: Any,
) -> None:
    ops = operators_of_another_package
    with replace_sdpa():
        assert torch.equal(ops.norm(X), X)
        assert torch.equal(ops.flash_attn_backward(X), X)
        assert torch.equal(torch.ops.aten.cos(X), X.cos())
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(X, X, X)
        assert_close({"out": F.scaled_dot_product_attention(X, X, X)}, {"out": out})
        jvp_attn.flash_attn_jvp(X, X, X)
