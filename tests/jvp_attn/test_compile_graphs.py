"""Compiled graphs: what they contain, when they are reused, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import jvp

import jvp_attn
from jvp_attn import flash_attn_jvp, flash_attn_varlen_jvp, replace_sdpa
from tests.jvp_attn.attention_cases import Case, Tensors, assert_close, energy, named, randn
from tests.jvp_attn.compile_cases import MASKED, jvp_along_q, masked
from tests.jvp_attn.composition_autograd import leaves

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Recorder:
    """Compiles as aot_eager does, and records the graphs.

    Attributes:
        made: the graphs of forward passes, in the order of compilation.
        ran: the same graphs, in the order of calls.
    """

    def __init__(self) -> None:
        self.made: list[torch.fx.Graph] = []
        self.ran: list[torch.fx.Graph] = []
        self._backend = aot_autograd(
            fw_compiler=self._recorded, bw_compiler=lambda module, _: make_boxed_func(module)
        )

    def _recorded(self, module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.made.append(module.graph)

        def run(*arguments: Any) -> Any:
            self.ran.append(module.graph)
            return module(*arguments)

        return make_boxed_func(run)

    def __call__(self, f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(f, backend=self._backend, fullgraph=True, **options)


def attention_in(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The operators of this package in the graph."""
    return [node for node in graph.nodes if str(node.target).startswith("jvp_attn.")]


def test_primal_and_tangent_are_one_operator_without_absent_tangents() -> None:
    recorder = Recorder()
    jvp_along_q(masked, MASKED.primals(), MASKED.tangents(), recorder)
    (graph,) = recorder.made
    (node,) = attention_in(graph)
    assert node.target == torch.ops.jvp_attn.forward_jvp.default
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
    assert arguments["tq"] is not None
    assert [arguments[name] for name in ("tk", "tv", "tmask")] == [None, None, None]


def of_length(length: int) -> Tensors:
    q, k, v = MASKED.shapes.values()
    return tuple(
        randn(shape[0], length + extra, *shape[2:], seed=name)
        for name, shape, extra in zip("qkv", (q, k, v), (0, 1, 1), strict=True)
    )


def attention_with_jvp(q: Tensor, k: Tensor, v: Tensor) -> Any:
    def masked_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return flash_attn_jvp(q, k, v, attn_mask=k[:1, :, 0, 0], causal=True, return_lse=True)

    return jvp(masked_by_row, (q, k, v), (q.cos(), k.sin(), v.exp()))


def packed_attention_with_jvp(q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    ends = [torch.tensor([0, 1, x.shape[0]], dtype=torch.int32) for x in (q, k)]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return flash_attn_varlen_jvp(q, k, v, *ends, q.shape[0], k.shape[0], return_lse=True)

    return jvp(packed, (q, k, v), (q.cos(), k.sin(), v.exp()))


@pytest.mark.parametrize(
    ("f", "options", "graphs"),
    [(attention_with_jvp, {}, 2), (packed_attention_with_jvp, {"dynamic": True}, 1)],
)
def test_new_sequence_lengths_reuse_graphs(
    f: Callable[..., Any], options: dict[str, bool], graphs: int
) -> None:
    recorder = Recorder()
    compiled = recorder(f, **options)
    for length in (5, 6, 9, 17):
        x = leaves(of_length(length))
        outputs, output_tangents = compiled(*x)
        gradients = torch.autograd.grad(energy(outputs + output_tangents), x)

        expected, expected_tangents = f(*x)
        expected_gradients = torch.autograd.grad(energy(expected + expected_tangents), x)
        assert_close(
            named((outputs, output_tangents, gradients)),
            named((expected, expected_tangents, expected_gradients)),
        )
    assert len(recorder.made) == graphs


def test_the_softmax_scale_may_vary() -> None:
    def attention(scale: float, *x: Tensor) -> Any:
        return jvp(lambda *x: flash_attn_jvp(*x, softmax_scale=scale, return_lse=True), x, x)

    compiled = Recorder()(attention)
    x = of_length(5)
    for scale in (0.5, 0.25, -1.5, 2):
        assert_close(named(compiled(scale, *x)), named(attention(scale, *x)))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(512, 300), (0, 3), (3, 0)], ids=["wide", "no d", "no d_v"]
)
def test_any_head_dims_compile(head_dim: int, head_dim_v: int) -> None:
    case = Case(seqlen_q=3, seqlen_k=4, head_dim=head_dim, head_dim_v=head_dim_v)
    x, t = case.point_and_direction()

    def attention(*x: Tensor) -> Any:
        return jvp(case.ours, x, t)

    assert_close(named(Recorder()(attention)(*x)), named(attention(*x)))


# ----------------------------------------------------------------------------
# Recompilation on a change of backend


def test_compiled_code_uses_the_chosen_backend() -> None:
    recorder = Recorder()
    compiled = recorder(masked)

    def calls_the_operators() -> bool:
        """Whether a call now uses the operators; the backend `math` uses none."""
        compiled(*MASKED.primals())
        return attention_in(recorder.ran[-1]) != []

    assert calls_the_operators()
    with jvp_attn.backend("math"):
        assert not calls_the_operators()
    assert calls_the_operators()


def test_compiled_code_can_choose_a_backend() -> None:
    def both(*x: Tensor) -> Tensors:
        with jvp_attn.backend("math"):
            naive = masked(*x)
        return masked(*x) + naive

    recorder = Recorder()
    assert_close(named(recorder(both)(*MASKED.primals())), named(both(*MASKED.primals())))
    assert len(attention_in(recorder.ran[-1])) == 1


def test_compiled_code_follows_replace_sdpa() -> None:
    recorder = Recorder()
    compiled = recorder(F.scaled_dot_product_attention)
    heads_first = [x.transpose(1, 2) for x in MASKED.primals()]

    def calls_the_operators() -> bool:
        compiled(*heads_first)
        return attention_in(recorder.ran[-1]) != []

    assert not calls_the_operators()
    with replace_sdpa():
        assert calls_the_operators()
    assert not calls_the_operators()
