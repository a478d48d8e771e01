"""What composes with attention: the rows of docs/composition.md and of the tests behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.jvp_attn import composition_autograd as autograd
from tests.jvp_attn import composition_checks as checks
from tests.jvp_attn import composition_func as func
from tests.jvp_attn.attention_cases import Attention, Tensors
from tests.jvp_attn.composition_features import Feature

# (f, x, t) → nested tensors.
Derivative = Callable[[Attention, Tensors, Tensors], Any]
Check = Callable[[Feature], None]


@dataclass(frozen=True)
class Row:
    """A use of PyTorch that is exact with every feature of attention, or raises.

    Attributes:
        use: its name in docs/composition.md.
        derivatives: the derivatives that this use computes; each must equal the oracle.
        checks: assertions about a feature, for a use that computes no derivative itself.
        of_tangents: whether it also works with features that are a tangent; else it raises there.
    """

    use: str
    derivatives: tuple[Derivative, ...] = ()
    checks: tuple[Check, ...] = ()
    of_tangents: bool = False

    def composes_with(self, feature: Feature) -> bool:
        """Whether the use works with this feature; if not, it raises."""
        return self.of_tangents or not feature.is_tangent


ROWS = [
    Row(
        "`func.jvp` with any subset of tangents, `func.linearize`",
        (
            func.jvp_,
            func.jvp_along_each_subset,
            func.jvp_without_grad,
            func.jvp_in_inference_mode,
        ),
        checks=(checks.linearize_,),
    ),
    Row(
        "`forward_ad` dual numbers, with and without grad",
        (
            autograd.dual_numbers,
            autograd.dual_number_for_each,
            autograd.dual_numbers_that_require_grad,
            autograd.dual_numbers_without_grad,
            autograd.dual_numbers_under_vmap,
        ),
    ),
    Row(
        "`.backward()`, `func.grad`, `func.vjp`",
        (autograd.backward_, func.grad_, func.grad_for_each, func.vjp_),
        of_tangents=True,
    ),
    Row(
        "`.backward()` after a jvp, through `out`, `lse` and their tangents",
        (
            autograd.backward_through_out,
            autograd.backward_through_tangent,
            autograd.backward_through_out_and_tangent,
            autograd.backward_through_lse_and_mu,
            autograd.backward_through_all,
            autograd.backward_to_some,
            autograd.backward_of_dual_numbers,
            autograd.backward_of_dual_numbers_for_their_directions,
        ),
    ),
    Row(
        "`func.grad`, `func.vjp` of `func.jvp`",
        (
            func.grad_of_jvp,
            func.grad_of_jvp_along_one,
            func.grad_of_jvp_for_its_direction,
            func.vjp_of_jvp,
        ),
    ),
    Row(
        "`func.jvp` of `func.grad`, `autograd.grad` of dual numbers",
        (
            func.jvp_of_grad,
            func.jvp_of_grad_along_one,
            func.jvp_of_vjp_along_its_cotangent,
            autograd.gradient_of_dual_numbers,
            autograd.gradient_of_one_dual_number,
            autograd.func_grad_of_dual_numbers,
        ),
    ),
    Row(
        "`func.grad` of `func.grad`, `autograd.grad(create_graph=True)`",
        (
            func.grad_of_grad,
            autograd.gradient_penalty,
            autograd.gradient_penalty_of_one,
            autograd.double_backward_along_t,
            autograd.backward_of_func_grad,
            autograd.jvp_by_double_backward,
        ),
    ),
    Row(
        "`func.hessian`",
        (func.hessian_, func.hessian_in_a_plane, func.jacrev_of_jacfwd, func.jacrev_of_jacrev),
    ),
    Row("`func.jacfwd`", (func.jacfwd_,)),
    Row(
        "`func.jacrev`, `autograd.grad(is_grads_batched=True)`",
        (func.jacrev_, autograd.batched_gradients),
        of_tangents=True,
    ),
    Row(
        "`func.vmap`, any `in_dims`, nested; `func.vmap` of `func.grad`",
        (
            func.vmap_,
            func.vmap_over_each,
            func.vmap_over_inner_dimensions,
            func.vmap_of_vmap,
            func.vmap_of_grad,
            func.vmap_of_grad_over_one,
            autograd.backward_of_vmap,
        ),
        of_tangents=True,
    ),
    Row(
        "`func.vmap` and `func.jvp` in any order, derivatives of both",
        (
            func.vmap_of_jvp,
            func.vmap_of_jvp_over_directions,
            func.jvp_of_vmap,
            func.jvp_of_vmap_over_one,
            func.grad_of_vmap_of_jvp,
            func.vmap_of_grad_of_jvp,
            func.vmap_of_jvp_of_grad,
            func.vmap_of_grad_of_grad,
        ),
    ),
    Row("`checkpoint` around attention", (autograd.checkpoint_around_attention,), of_tangents=True),
    Row("`checkpoint` around a jvp", (autograd.checkpoint_around_jvp,)),
    Row("`gradcheck`, forward and reverse, batched", checks=(checks.gradcheck_,), of_tangents=True),
    Row("`gradgradcheck`, forward and reverse, batched", checks=(checks.gradgradcheck_,)),
    Row(
        "`FakeTensorMode`, device `meta`",
        checks=(checks.on_meta, checks.in_fake_tensor_mode),
        of_tangents=True,
    ),
    Row("`make_fx`", checks=(checks.make_fx_,), of_tangents=True),
]


@dataclass(frozen=True)
class Unsupported:
    """A use of PyTorch that raises with every feature.

    Attributes:
        use: its name in docs/composition.md.
        derivatives: the derivatives that this use computes.
        error: the type of the error.
        message: a regular expression for its message.
    """

    use: str
    derivatives: tuple[Derivative, ...]
    error: type[Exception]
    message: str


ORDER_TOO_HIGH = r"jvp of jvp\) is not implemented|needs a third derivative of attention"
UNSUPPORTED = [
    Unsupported(
        "`func.jvp` of `func.jvp`, third derivatives",
        (
            func.jvp_of_jvp,
            func.jacfwd_of_jacfwd,
            func.jvp_of_grad_of_jvp,
            func.jvp_of_grad_of_grad,
            func.grad_of_grad_of_jvp,
            func.grad_of_jvp_of_grad,
            func.grad_of_grad_of_grad,
            autograd.backward_thrice,
            autograd.backward_through_tangent_within_its_level,
        ),
        NotImplementedError,
        ORDER_TOO_HIGH,
    ),
    Unsupported(
        "nested `forward_ad` dual levels",
        (autograd.nested_dual_levels, autograd.func_jvp_within_a_dual_level),
        RuntimeError,
        "Nested forward mode AD is not supported",
    ),
    Unsupported(
        "`autograd.functional.jacobian` in forward mode",
        (autograd.jacobian_in_forward_mode,),
        RuntimeError,
        f"Batching rule not implemented|{ORDER_TOO_HIGH}",
    ),
]


@dataclass(frozen=True)
class OtherUse:
    """A use of PyTorch that other tests cover, with some of the features.

    Attributes:
        use: its name in docs/composition.md.
        exact: whether it is exact; else it raises.
        tests: the tests that show it, as "file::function" under tests/.
    """

    use: str
    exact: bool
    tests: tuple[str, ...]


OTHER_USES = [
    OtherUse(
        "`torch.compile(fullgraph=True)`: attention, a jvp of it, gradients through both; "
        "varying sequence lengths",
        True,
        (
            "jvp_attn/test_compile.py::test_a_compiled_feature_equals_eager",
            "jvp_attn/test_compile.py::test_inductor_equals_eager",
            "jvp_attn/test_compile_graphs.py::test_new_sequence_lengths_reuse_graphs",
        ),
    ),
    OtherUse(
        "`torch.compile` of other `torch.func` transforms, and transforms of compiled functions: "
        "graph breaks",
        True,
        (
            "jvp_attn/test_compile_graph_breaks.py"
            "::test_an_unsupported_transform_breaks_the_graph_and_equals_eager",
        ),
    ),
    OtherUse(
        "the same with `func.grad` innermost: torch cannot resume after the graph break",
        False,
        (
            "jvp_attn/test_compile_graph_breaks.py"
            "::test_torch_raises_after_a_graph_break_inside_func_grad",
        ),
    ),
    OtherUse(
        "the same with `fullgraph=True`",
        False,
        (
            "jvp_attn/test_compile_graph_breaks.py"
            "::test_an_unsupported_transform_raises_with_fullgraph",
        ),
    ),
    OtherUse(
        "the gradient of a gradient of a compiled function",
        False,
        (
            "jvp_attn/test_compile_graph_breaks.py"
            "::test_torch_raises_for_the_gradient_of_a_compiled_gradient",
        ),
    ),
    OtherUse(
        "`torch.autocast`",
        True,
        ("jvp_attn/test_autocast.py::test_autocast_changes_no_derivative",),
    ),
    OtherUse(
        "DDP and FSDP2 (`fully_shard`): jvp, gradients through output and tangent",
        True,
        ("distributed/test_data_parallel.py::test_each_rank_agrees_with_one_process",),
    ),
    OtherUse(
        "collectives of torch.distributed on a tensor with a tangent, under `replace_sdpa`; "
        "those that write to an argument with torch ≥ 2.13",
        False,
        ("jvp_attn/test_replace_sdpa_collectives.py::test_a_collective_on_a_tangent_raises",),
    ),
    OtherUse(
        "attention in the rules of a custom `autograd.Function`, under `replace_sdpa`",
        True,
        (
            "jvp_attn/test_replace_sdpa_functions.py"
            "::test_all_rules_of_a_function_call_the_attention",
        ),
    ),
    OtherUse(
        "`FlopCounterMode`: matrix products of attention and of its derivatives",
        True,
        ("jvp_attn/test_flops.py::test_derivatives_take_as_many_products_as_the_algorithm",),
    ),
    OtherUse(
        "`jvp_attn.checkpoint_jvp` inside a jvp, and a gradient through both",
        True,
        (
            "jvp_attn/test_checkpoint_jvp.py::test_every_feature_of_attention_can_be_checkpointed",
            "jvp_attn/test_checkpoint_jvp.py::test_a_checkpoint_changes_nothing",
        ),
    ),
    OtherUse(
        "`jvp_attn.checkpoint_primal` inside a jvp, and `.backward()` through the output",
        True,
        (
            "jvp_attn/test_checkpoint_primal.py"
            "::test_values_and_gradients_through_the_output_do_not_change",
        ),
    ),
    OtherUse(
        "both inside `func.grad`, `func.vjp`, `func.vmap` or two jvps, with grad",
        False,
        (
            "jvp_attn/test_checkpoint_jvp_unsupported.py::test_other_transforms_raise",
            "jvp_attn/test_checkpoint_primal.py::test_other_transforms_raise",
        ),
    ),
    OtherUse(
        "`jvp_attn.checkpoint_primal` inside a jvp, and `autograd.grad` or `create_graph=True`",
        False,
        (
            "jvp_attn/test_checkpoint_primal.py"
            "::test_backward_passes_that_do_not_reach_the_parameters_raise",
        ),
    ),
    OtherUse(
        "`checkpoint` inside a jvp, without grad",
        True,
        (
            "jvp_attn/test_checkpoint.py"
            "::test_a_checkpoint_inside_a_jvp_changes_nothing_without_grad",
        ),
    ),
    OtherUse(
        "`checkpoint` inside a jvp, and a gradient through both",
        False,
        (
            "jvp_attn/test_checkpoint.py"
            "::test_a_checkpoint_inside_a_jvp_raises_in_the_backward_pass",
        ),
    ),
    OtherUse(
        "`torch.export`, also with a jvp inside; the exported module under `func.jvp`, and "
        "gradients through both",
        True,
        (
            "jvp_attn/test_replace_sdpa_tracers.py"
            "::test_an_exported_module_has_tangents_and_gradients",
            "jvp_attn/test_replace_sdpa_tracers.py"
            "::test_an_export_may_have_varying_sizes_and_a_jvp_inside",
        ),
    ),
    OtherUse(
        "`fx.symbolic_trace` under `replace_sdpa`",
        True,
        (
            "jvp_attn/test_replace_sdpa_tracers.py"
            "::test_a_symbolic_trace_contains_the_attention_of_this_package",
        ),
    ),
    OtherUse(
        "`func.jvp` of a derivative that `make_fx` recorded",
        False,
        (
            "jvp_attn/test_op_tangents.py"
            "::test_recorded_attention_has_a_tangent_and_a_recorded_derivative_raises",
        ),
    ),
    OtherUse(
        "`torch.jit.trace`",
        False,
        ("jvp_attn/test_replace_sdpa_tracers.py::test_jit_trace_raises",),
    ),
    OtherUse(
        "`torch.library.opcheck` of every operator",
        True,
        ("jvp_attn/test_ops.py::test_opcheck",),
    ),
    OtherUse(
        "models of diffusers, timm and transformers, under `replace_sdpa`",
        True,
        ("models/test_networks.py::test_output_tangent_and_gradients_are_torchs",),
    ),
]

# Derivatives that torch's own attention lacks: the naive formula is the oracle.
TORCH_CANNOT: set[Derivative] = {autograd.backward_of_dual_numbers}
