"""Compiled blocks compute what the others do, and every call of them runs compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from jvp_attn import checkpoint_jvp, checkpoint_primal
from rcm import train
from rcm.distributed.layout import MeshConfig
from rcm.errors import RunError
from rcm.models.backbone import Backbone
from rcm.models.compiled_blocks import compile_blocks
from rcm.models.diffusers import Architecture
from rcm.presets.pretrained import PRETRAINED
from tests.rcm.commands.tiny_run import assert_equal_up_to_rounding, metrics
from tests.rcm.models.backbones import example, tiny_backbone

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counted:
    """A backend of torch.compile that counts its graphs and their calls."""

    def __init__(self, name: str) -> None:
        self.name, self.graphs, self.calls = name, 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = lookup_backend(self.name)(graph, inputs)
        self.graphs += 1

        def call(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return call


def blocks_of(network: Backbone) -> list[nn.Module]:
    return [block for blocks in network.blocks for block in blocks]


def pair(architecture: Architecture, backend: Any) -> tuple[Backbone, Backbone]:
    """Two equal networks with checkpoints; the second is compiled."""
    networks = tiny_backbone(architecture), tiny_backbone(architecture)
    for network in networks:
        network.enable_gradient_checkpointing(checkpoint_primal)
    compile_blocks(blocks_of(networks[1]), backend)
    return networks


def one_pass(network: Backbone, architecture: Architecture) -> dict[str, Tensor]:
    """F, its derivative along a tangent, and the gradients of a loss of both."""
    x, t, condition = example(architecture)
    network.zero_grad()
    f, derivative = torch.func.jvp(
        lambda x, t: network(x, t, condition), (x, t), (x.cos(), torch.ones_like(t))
    )
    (f - f.detach() + derivative.detach()).square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"F": f.detach(), "derivative": derivative.detach(), **gradients}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    for name, x in expected.items():
        # Some gradients are zero but for rounding, such as that of a key's bias.
        error = float((found[name] - x).norm())
        assert error <= TOLERANCE * float(x.norm()) + 1e-8 * largest, name


@pytest.mark.parametrize(
    ("architecture", "backend", "graphs"),
    [
        ("wan", "aot_eager", 2),
        *(
            pytest.param(architecture, backend, graphs, marks=pytest.mark.slow)
            for architecture, backend, graphs in (
                ("cosmos", "aot_eager", 2),
                ("sd3", "aot_eager", 4),
                ("flux", "aot_eager", 4),
                ("wan", "inductor", 2),  # which takes half a minute or more for each
            )
        ),
    ],
)
def test_a_step_equals_eager(architecture: Architecture, backend: str, graphs: int) -> None:
    """All blocks share a graph of the jvp and one with gradients; sd3 and flux have two kinds."""
    counted = Counted(backend)
    eager, compiled = pair(architecture, counted)
    expected = one_pass(eager, architecture)
    assert_near(one_pass(compiled, architecture), expected)
    blocks = len(blocks_of(compiled))
    assert counted.calls == 2 * blocks
    assert_near(one_pass(compiled, architecture), expected)
    assert (counted.calls, counted.graphs) == (4 * blocks, graphs)


@pytest.mark.slow
def test_two_passes_and_a_teacher_equal_eager() -> None:
    """A jvp without gradients, a pass with gradients outside of a jvp, and one without."""
    eager, compiled = pair("wan", counted := Counted("eager"))
    compiled.enable_gradient_checkpointing(checkpoint_jvp)
    expected = one_pass(eager, "wan")
    x, t, condition = example("wan")
    with torch.no_grad():
        _, derivative = torch.func.jvp(
            lambda x, t: compiled(x, t, condition), (x, t), (x.cos(), torch.ones_like(t))
        )
    f = compiled(x, t, condition)
    (f - f.detach() + derivative).square().mean().backward()
    gradients = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    assert_near({"F": f.detach(), "derivative": derivative, **gradients}, expected)
    blocks = len(blocks_of(compiled))
    assert (counted.calls, counted.graphs) == (3 * blocks, 2)  # the backward pass is the third
    with torch.no_grad():
        assert_near({"F": compiled(x, t, condition)}, {"F": expected["F"]})
    assert (counted.calls, counted.graphs) == (4 * blocks, 3)


class Scaled(nn.Module):
    """A block with keywords, and outputs of several kinds."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, *, shift: tuple[Tensor, Tensor], twice: bool = False) -> Any:
        y = x * self.weight + shift[0]
        return None, {"twice": 2 * y if twice else y, "constant": shift[1].cos()}, "text"


def test_arguments_and_outputs_keep_their_structure() -> None:
    block, tangent = Scaled(), torch.ones(3)
    shift = torch.randn(3), torch.randn(3)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        nothing, outputs, text = block(x, shift=shift, twice=True)
        assert (nothing, text) == (None, "text")
        return outputs["twice"], outputs["constant"]

    def both() -> Any:
        with torch.no_grad():
            return torch.func.jvp(call, (torch.ones(3),), (tangent,)), call(torch.ones(3))

    expected = both()
    compile_blocks([block], "eager")
    torch.testing.assert_close(both(), expected)


class Normalised(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(input=x, normalized_shape=(3,), weight=self.weight)


@pytest.mark.parametrize("function", [nn.functional.layer_norm, torch.layer_norm])
def test_layer_norm_takes_its_input_by_name(function: Callable[..., Tensor]) -> None:
    block, x, tangent = Normalised(function), torch.randn(2, 3), torch.randn(2, 3)

    def both() -> Any:
        with torch.no_grad():
            return torch.func.jvp(block, (x,), (tangent,))

    expected = both()
    compile_blocks([block], "eager")
    torch.testing.assert_close(both(), expected)


def test_a_checkpointed_block_has_a_gradient_but_a_detached_tangent() -> None:
    block, shift = Scaled(), (torch.ones(3), torch.ones(3))
    compile_blocks([block], "eager")
    x = torch.ones(3, requires_grad=True)
    out, tangent = torch.func.jvp(
        lambda x: checkpoint_primal(block, x, shift=shift)[1]["twice"], (x,), (torch.ones(3),)
    )
    assert not tangent.requires_grad
    out.sum().backward()
    assert block.weight.grad == 3
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_networks_that_train_together_share_their_graphs() -> None:
    counted = Counted("eager")
    blocks = [Scaled(2.0), Scaled(3.0)]
    compile_blocks(blocks, counted)
    shift = torch.ones(3), torch.ones(3)
    for block in blocks:
        _, outputs, _ = block(torch.ones(3), shift=shift)
        assert torch.equal(outputs["twice"], torch.ones(3) * block.weight + 1)
    assert (counted.graphs, counted.calls) == (1, 2)


def test_a_gradient_through_the_tangent_raises() -> None:
    block = Scaled()
    compile_blocks([block], "eager")
    shift = torch.ones(3), torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"compiled Scaled has no gradient .*tangent"):
        torch.func.jvp(lambda x: block(x, shift=shift)[1], (torch.ones(3),), (torch.ones(3),))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_block_may_get_no_tangent_inside_of_a_jvp(grad: bool, wrapped: bool) -> None:
    """Of a tensor from outside of the jvp, and of one that was computed inside."""
    block, shift = Scaled(), (torch.randn(3), torch.randn(3))
    x, tangent, constant = (torch.randn(3, requires_grad=True) for _ in range(3))

    def network(x: Tensor) -> Tensor:
        still = constant.sin() if wrapped else constant
        return x * block(still, shift=shift)[1]["twice"]

    def results() -> Any:
        with torch.set_grad_enabled(grad):
            outputs = torch.func.jvp(network, (x,), (tangent,))
        if not grad:
            return outputs
        loss = sum(y.square().sum() for y in outputs)
        return outputs, torch.autograd.grad(loss, (x, tangent, constant, block.weight))

    expected = results()
    compile_blocks([block], counted := Counted("eager"))
    torch.testing.assert_close(results(), expected)
    assert counted.calls == 1


class InPlace(nn.Linear):
    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        return super().forward(x.mul_(2)) + added


@pytest.mark.parametrize("call", [checkpoint_primal, lambda f, *args: f(*args)])
@pytest.mark.parametrize("moving", [True, False])
def test_modifying_an_argument_in_place_raises(call: Callable[..., Any], moving: bool) -> None:
    block = InPlace(3, 3)
    compile_blocks([block], "aot_eager")
    x, tangent, constant = torch.randn(3, 2, 3)

    def network(x: Tensor) -> Any:
        return call(block, x.sin() if moving else constant.sin(), constant)

    message = r"InPlace must not modify its arguments in place.*shape \(2, 3\).* a clone"
    with (
        torch.set_grad_enabled(call is checkpoint_primal),
        pytest.raises(NotImplementedError, match=message),
    ):
        torch.func.jvp(network, (x,), (tangent,))


def test_other_transforms_and_tangents_of_weights_raise() -> None:
    block, x = nn.Linear(3, 3), torch.randn(2, 3)
    compile_blocks([block], "eager")
    with pytest.raises(NotImplementedError, match=r"Linear works .*one torch.func.jvp.* grad: run"):
        torch.func.grad(lambda x: block(x).sum())(x)
    with pytest.raises(NotImplementedError, match=r"Linear works .*one torch.func.jvp.* vmap: run"):
        torch.func.vmap(block)(x)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"\(outermost first\) jvp, jvp"):
        torch.func.jvp(lambda x: torch.func.jvp(block, (x,), (x,))[1], (x,), (x,))


def test_tangents_of_weights_raise() -> None:
    block, x = nn.Linear(3, 3), torch.randn(2, 3)
    compile_blocks([block], "eager")
    weights = {"weight": block.weight.detach()}

    def call(weights: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(block, weights, (x,))

    message = "weight of a compiled Linear has a tangent"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(call, (weights,), (weights,))
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(weights["weight"], torch.ones(3, 3))
        with pytest.raises(NotImplementedError, match=message):
            call({"weight": dual})


def test_dual_numbers_raise() -> None:
    block, x = nn.Linear(3, 3), torch.randn(2, 3)
    compile_blocks([block], "eager")
    with torch.no_grad(), forward_ad.dual_level():
        assert block(x).shape == (2, 3)
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=r"dual numbers.*: use torch\.func\.jvp"):
            block(dual)


class Splitting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


def test_a_block_of_several_graphs_raises() -> None:
    block = Splitting()
    compile_blocks([block], "eager")
    message = r"Splitting cannot be compiled: .*graph_break.*args.*\. Run without compile"
    with pytest.raises(RunError, match=message):
        block(torch.ones(3))


def test_a_block_of_too_many_shapes_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcm.models.compiled_blocks.MAX_GRAPHS", 2)
    block = nn.Linear(2, 2)
    compile_blocks([block], Counted("eager"))
    for batch in (2, 3):
        block(torch.ones(batch, 2))
    with pytest.raises(RunError, match=r"Linear needs more than 2 compiled graphs.*shapes"):
        block(torch.ones(4, 2))


def test_operations_are_counted_uncompiled() -> None:
    block = nn.Linear(2, 2)
    compile_blocks([block], counted := Counted("eager"))
    with FlopCounterMode(display=False) as flops:
        block(torch.ones(3, 2))
    assert (flops.get_total_flops(), counted.calls) == (2 * 3 * 2 * 2, 0)


def test_dropout_and_a_second_compilation_raise() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    with pytest.raises(NotImplementedError, match=r"Sequential has dropout.*set it to 0"):
        compile_blocks([block])
    block[1].p = 0.0
    compile_blocks([block])
    with pytest.raises(NotImplementedError, match="forward method of this Sequential"):
        compile_blocks([block])


def test_the_setting_excludes_context_parallelism() -> None:
    config = PRETRAINED["wan-tiny"].config("wan-tiny", "rcm")
    assert not config.compile
    with pytest.raises(ValueError, match=r"mesh\.ring × mesh\.ulysses is 2.*leave out one"):
        replace(config, compile=True, mesh=MeshConfig(ulysses=2))


def test_a_compiled_run_has_the_metrics_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted("eager")
    monkeypatch.setattr(
        "rcm.run_pretrained.compile_blocks", partial(compile_blocks, backend=counted)
    )
    options = ["--student.iterations", "4", "--student.critic-start", "2"]
    found = []
    for name, option in (("eager", "--no-compile"), ("compiled", "--compile")):
        assert train.main(["wan-tiny", "--folder", str(tmp_path / name), option, *options]) == 0
        found.append(metrics(tmp_path / name))
        assert (counted.calls > 0) == (option == "--compile")
    assert_equal_up_to_rounding(found[1], found[0])
