"""The custom operators, as tracers, compilers and meta tensors see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map_only

from jvp_attn import FlashAttention, FlashAttentionJvp
from jvp_attn.autograd import ops
from jvp_attn.backends import meta, select, tiled
from jvp_attn.backends.cuda import CudaBackend, MetaCudaBackend
from jvp_attn.types import JvpCotangents
from tests.jvp_attn.attention_cases import Case, assert_close, named, projection
from tests.jvp_attn.composition_checks import metadata
from tests.jvp_attn.emulated_backend import emulated_backend
from tests.jvp_attn.kernel_recorder import Recorder
from tests.jvp_attn.packed_cases import PackedCase
from tests.jvp_attn.primitive_calls import PrimitiveCall, call_of

CASES: dict[str, Case | PackedCase] = {
    "plain": Case(),
    "causal as in torch": Case(causal=True, torchs_interface=True),
    "boolean mask": Case(mask="boolean", mask_dims="b.qk"),
    "additive mask": Case(mask="additive", mask_dims=".h.k", with_tangent="qkvm"),
    "packed": PackedCase(beyond=2, causal=True),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def full_call(case: Case | PackedCase, backend: str) -> PrimitiveCall:
    """Every argument is given, and every result requested."""
    call = call_of(case, backend=backend)
    has_tangent = tuple(t is not None for t in call.tangents)
    return replace(call, needs=(True, True, True, has_tangent[3], *has_tangent))


def sparse_call(case: Case | PackedCase, backend: str) -> PrimitiveCall:
    """Only the necessary arguments and results."""
    call = call_of(replace(case, with_tangent=""), backend=backend, return_lo=False)
    return replace(
        call.changed("outputs", out_lo=None, tout_lo=None, lse_lo=None),
        cotangents=JvpCotangents(lse=call.cotangents.lse),
        options=replace(call.options, deterministic=False),
        needs=(False, True, False, False, True, False, False, False),
    )


over_calls = pytest.mark.parametrize(
    "call_of_case", [full_call, sparse_call], ids=lambda f: f.__name__
)


# ----------------------------------------------------------------------------
# Arguments and results


class ArgumentRecorder:
    """The backend `tiled`, which records the arguments of each call."""

    def __init__(self) -> None:
        self.given: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def recording(*arguments: Any) -> Any:
            self.given.append((name, arguments))
            return getattr(tiled, name)(*arguments)

        return recording


@over_calls
@over_cases
def test_operators_pass_arguments_and_results_unchanged(
    case: Case | PackedCase, call_of_case: Callable[..., PrimitiveCall]
) -> None:
    directly, through_operators = ArgumentRecorder(), ArgumentRecorder()
    recording = select._Backend(lambda: through_operators, meta=meta)
    with mock.patch.dict(select._BACKENDS, {"recording": recording}):
        call = call_of_case(case, "recording")
        expected = call.all_four(directly)
        found = call.all_four(ops)
    assert_close(named(found), named(expected), tolerance=0)
    for (name, given), (same_name, same) in zip(
        through_operators.given, directly.given, strict=True
    ):
        assert name == same_name
        for x, y in zip(tree_leaves(given), tree_leaves(same), strict=True):
            if isinstance(y, Tensor):
                assert (x.data_ptr(), x.shape) == (y.data_ptr(), y.shape)
            else:
                assert x == y


def test_a_tracer_sees_one_operator_for_each_primitive() -> None:
    call = call_of(Case(mask="additive"), backend="tiled")

    def gradients(q: Tensor) -> Any:
        q = q.detach().requires_grad_()
        inputs = call.inputs._replace(q=q)
        out, *_ = FlashAttention.apply(*inputs, call.options)
        _, _, tout, *_ = FlashAttentionJvp.apply(*inputs, *call.tangents, call.options)
        return torch.autograd.grad(out.sum() + tout.sum(), q)

    graph = make_fx(gradients, tracing_mode="fake", _allow_non_fake_inputs=True)(call.inputs.q)
    operators = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    ours = [name for name in operators if "jvp_attn" in name]
    names = ["forward", "forward_jvp", "jvp_backward", "backward"]
    assert sorted(ours) == sorted(f"jvp_attn.{name}.default" for name in names)
    assert not [name for name in operators if "mm" in name]


# ----------------------------------------------------------------------------
# Meta and fake tensors


@contextmanager
def recorded_kernels() -> Iterator[None]:
    """The backend `cuda` with an extension that only records."""
    recorder = Recorder()
    backend = CudaBackend(recorder, recorder.stream_of)
    with mock.patch.dict(
        select._BACKENDS, {"cuda": select._Backend(lambda: backend, MetaCudaBackend())}
    ):
        yield


BACKENDS = {
    "cpu": nullcontext,
    "tiled": nullcontext,
    "cuda": recorded_kernels,
    "emulated": emulated_backend,
}
over_backends = pytest.mark.parametrize("backend", BACKENDS)


@over_backends
@over_calls
@pytest.mark.parametrize(
    "case",
    [*CASES.values(), Case(head_dim=160, head_dim_v=256)],
    ids=[*CASES.keys(), "head dim 256"],
)
def test_meta_and_fake_results_have_the_shapes_strides_and_dtypes_of_real_ones(
    case: Case | PackedCase, call_of_case: Callable[..., PrimitiveCall], backend: str
) -> None:
    if backend == "cuda":
        case = replace(case, dtype=torch.bfloat16)
    call = call_of_case(case, backend)
    q = call.inputs.q.transpose(1, 2).contiguous().transpose(1, 2)
    call = call.changed("inputs", q=q)
    with BACKENDS[backend]():
        expected = metadata(call.all_four(ops))
        on_meta = call.mapped(lambda x: x.to("meta"))
        assert metadata(on_meta.all_four(ops)) == expected
        with FakeTensorMode() as mode:
            found = call.mapped(mode.from_tensor).all_four(ops)
        assert metadata(found) == expected


@pytest.mark.parametrize("backend", ["tiled", "cuda"])
def test_results_are_on_the_device_of_the_inputs(backend: str) -> None:
    case = Case(head_dim=136, mask="boolean", dtype=torch.bfloat16)
    call = call_of(case, backend=backend)
    with FakeTensorMode() as mode:
        on_gpu = call.mapped(lambda x: mode.from_tensor(x).to("cuda:0"))
        found = on_gpu.all_four(ops)
    assert {x.device for x in named(found).values()} == {torch.device("cuda:0")}


def test_an_unsupported_dtype_raises_for_meta_tensors_too() -> None:
    call = call_of(Case(dtype=torch.float32), backend="cuda").mapped(lambda x: x.to("meta"))
    with pytest.raises(TypeError, match="the CUDA kernels compute in float16 and bfloat16"):
        call.forward(ops)


# ----------------------------------------------------------------------------
# Torch's own checks of operators


def arguments_of(call: PrimitiveCall) -> dict[str, tuple[Any, ...]]:
    """The arguments of each operator, by its name."""
    out, lse, _, _, out_lo, _, lse_lo = call.outputs
    options = call.options
    scalars = (
        *(options.softmax_scale, int(options.causal), options.backend, options.return_lo),
        *(options.max_seqlens, options.deterministic, options.mask_group),
    )
    g_out, g_lse, *_ = call.cotangents
    primals_and_tangents = (*call.inputs, *call.tangents)
    return {
        "forward": (*call.inputs, *scalars),
        "forward_jvp": (*primals_and_tangents, *scalars),
        "backward": (
            *(*call.inputs, out, lse, out_lo, lse_lo, g_out, g_lse),
            *(call.needs[:4], *scalars),
        ),
        "jvp_backward": (
            *primals_and_tangents,
            *call.outputs,
            *call.cotangents,
            call.needs,
            *scalars,
        ),
    }


def with_gradients(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


@pytest.mark.parametrize(
    "call",
    [
        full_call(CASES["plain"], "tiled"),
        sparse_call(CASES["boolean mask"], "tiled"),
        full_call(CASES["additive mask"], "tiled"),
        full_call(CASES["packed"], "tiled"),
        full_call(CASES["additive mask"], "cpu"),
        full_call(Case(dtype=torch.bfloat16), "emulated"),
    ],
    ids=["plain", "sparse", "additive mask", "packed", "cpu", "by kernels"],
)
def test_opcheck(call: PrimitiveCall) -> None:
    with BACKENDS[call.options.backend]():
        for name, arguments in arguments_of(call).items():
            if name.startswith("forward"):  # the others have no derivative
                arguments = tree_map_only(Tensor, with_gradients, arguments)
            opcheck(getattr(torch.ops.jvp_attn, name).default, arguments)


# ----------------------------------------------------------------------------
# Derivatives registered for the compiler


@over_cases
def test_registered_derivatives_equal_those_of_the_functions(case: Case | PackedCase) -> None:
    call = full_call(case, "tiled").mapped(with_gradients)
    inputs, tangents, options = call.inputs, call.tangents, call.options
    leaves = [x for x in (*inputs, *tangents) if x is not None and x.requires_grad]

    def gradients(results: tuple[Tensor | None, ...], *names: str) -> dict[str, Tensor]:
        outputs = dict(zip(("out", "lse", "tout", "mu"), results, strict=False))
        loss = projection(*names)(outputs)
        return named(torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True))

    registered = ops.forward(inputs, options)
    of_functions = FlashAttention.apply(*inputs, options)
    for names in (("out",), ("lse",), ("out", "lse")):
        expected = gradients(of_functions, *names)
        assert_close(gradients(registered, *names), expected, tolerance=0)

    registered = ops.forward_jvp(inputs, tangents, options)
    of_functions = FlashAttentionJvp.apply(*inputs, *tangents, options)
    for names in (("out",), ("lse",), ("tout",), ("mu",), ("out", "lse", "tout", "mu")):
        expected = gradients(of_functions, *names)
        assert_close(gradients(registered, *names), expected, tolerance=0)


@pytest.mark.parametrize("operator", [ops.forward, ops.forward_jvp])
def test_second_derivatives_of_operators_raise(operator: Callable[..., Any]) -> None:
    call = call_of(Case(), backend="tiled").mapped(with_gradients)
    tangents = (call.tangents,) if operator is ops.forward_jvp else ()
    out, *_ = operator(call.inputs, *tangents, call.options)
    (gradient,) = torch.autograd.grad(out.sum(), call.inputs.q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: call flash_attn_jvp"):
        torch.autograd.grad(gradient.sum(), call.inputs.q)
