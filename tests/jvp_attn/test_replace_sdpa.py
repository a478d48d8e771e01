"""Inside `replace_sdpa()`, calls of torch's attention compute this package's attention."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

import jvp_attn
from jvp_attn import replace_sdpa
from tests.jvp_attn.attention_cases import assert_close, named
from tests.jvp_attn.sdpa_callers import SEQLEN, TX, Function, X, by_torch, self_attention


def torch_computes_attention(f: Function = self_attention) -> bool:
    """Whether torch computes the attention: its fused backends have no jvp and raise."""
    try:
        jvp(f, (X,), (TX,))
    except NotImplementedError as error:
        if "_scaled_dot_product_flash_attention" not in str(error):
            raise
        return True
    return False


# ----------------------------------------------------------------------------
# Scope of the block


def test_attention_is_replaced_only_inside_the_block() -> None:
    assert torch_computes_attention()
    with replace_sdpa():
        assert not torch_computes_attention()
    assert torch_computes_attention()


def test_attention_is_not_replaced_after_an_exception() -> None:
    with pytest.raises(KeyError), replace_sdpa():
        raise KeyError
    assert torch_computes_attention()


def test_blocks_can_be_nested() -> None:
    with replace_sdpa():
        with replace_sdpa():
            assert not torch_computes_attention()
            assert not torch_computes_attention(
                lambda x: torch.ops.aten.scaled_dot_product_attention(x, x, x)
            )
        assert not torch_computes_attention()
    assert torch_computes_attention()


def test_attention_is_not_replaced_in_other_threads() -> None:
    by_torch_in_thread = []

    def run() -> None:
        by_torch_in_thread.append(torch_computes_attention())

    with replace_sdpa():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert by_torch_in_thread == [True]


@pytest.mark.parametrize(
    "attention",
    [
        self_attention,
        lambda x: torch.ops.aten.scaled_dot_product_attention(x, x.sin(), x.cos()),
        lambda x: torch.ops.aten.scaled_dot_product_attention.default(x, x.sin(), x.cos()),
    ],
    ids=["functional", "operator", "overload"],
)
def test_calls_compute_the_attention_of_this_package(attention: Function) -> None:
    with replace_sdpa():
        actual = attention(X)
    expected = jvp_attn.scaled_dot_product_attention(X, X.sin(), X.cos())
    assert torch.equal(actual, expected)


def test_sdpa_kernel_has_no_effect_inside() -> None:
    with replace_sdpa(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not torch_computes_attention()


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: jvp(f, (X,), (TX,)),
    "grad": lambda f: grad(lambda x: (f(x) ** 3).sum())(X),
    "jvp of grad": lambda f: jvp(grad(lambda x: (f(x) ** 3).sum()), (X,), (TX,)),
    "grad of jvp": lambda f: grad(lambda x: (jvp(f, (x,), (TX,))[1] ** 3).sum())(X),
    "vmap of jvp": lambda f: vmap(lambda tx: jvp(f, (X,), (tx,))[1])(torch.stack([TX, X])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_work_inside_and_outside_the_block(transform: str) -> None:
    derivative = TRANSFORMS[transform]

    def entering(x: Tensor) -> Tensor:
        with replace_sdpa():
            return self_attention(x)

    expected = named(by_torch(derivative, self_attention))
    with replace_sdpa():
        assert_close(named(derivative(self_attention)), expected)
    assert_close(named(derivative(entering)), expected)


def test_outputs_from_inside_can_be_differentiated_outside() -> None:
    def outputs_and_gradient(around: Any) -> Any:
        x = X.clone().requires_grad_()
        with around:
            out, tangent = jvp(self_attention, (x,), (TX,))
        return out, tangent, torch.autograd.grad((out * tangent).sum(), x)

    actual = named(outputs_and_gradient(replace_sdpa()))
    assert_close(actual, named(outputs_and_gradient(sdpa_kernel(SDPBackend.MATH))))


# ----------------------------------------------------------------------------
# Other attention


@pytest.fixture(scope="module")
def operators_of_another_package() -> Iterator[Any]:
    with torch.library._scoped_library("another_package", "FRAGMENT") as library:
        for name in ("flash_attn_forward", "flash_attn_backward", "norm"):
            library.define(f"{name}(Tensor x) -> Tensor")
            library.impl(name, Tensor.clone, "CPU")
        yield torch.ops.another_package


LENGTHS = torch.tensor([0, SEQLEN], dtype=torch.int32)
UNSUPPORTED: dict[str, Callable[[Any], Any]] = {
    "flex_attention": lambda ops: flex_attention(X, X, X),
    "varlen_attn": lambda ops: varlen_attn(*3 * [X[0].mT], LENGTHS, LENGTHS, SEQLEN, SEQLEN),
    "_scaled_dot_product_flash_attention_for_cpu": (
        lambda ops: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(X, X, X)
    ),
    "another_package.flash_attn_forward": lambda ops: ops.flash_attn_forward(X),
    "another_package.flash_attn_forward.default": lambda ops: ops.flash_attn_forward.default(X),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_attention_raises(name: str, operators_of_another_package: Any) -> None:
    with replace_sdpa(), pytest.raises(Exception, match=r"inside replace_sdpa\(\)") as raised:
        UNSUPPORTED[name](operators_of_another_package)
    assert name.removesuffix("_attn") in str(raised.value)


def test_other_operators_and_differentiable_attention_work(
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
