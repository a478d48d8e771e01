"""One update of a network: the gradient of several terms, clipping, and the learning rate."""

import math
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from rcm.errors import RunError
from rcm.training.optimization import Nonfinite, Optimization, OptimizerConfig


class Network(nn.Module):
    """Four vectors, of which the terms use different ones."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("both", "first", "second", "neither"):
            setattr(self, name, nn.Parameter(torch.randn(5, dtype=torch.float64)))

    def terms(self) -> dict[str, Tensor]:
        return {
            "consistency": (self.both**2 * self.first).sum(),
            "dmd": 3 * (self.both.sin() + self.second**3).sum(),
        }


@pytest.fixture
def network() -> Network:
    return Network()


def optimization(
    network: nn.Module,
    clip: float = math.inf,
    nonfinite: Nonfinite = "stop",
    max_skips: int = 10,
) -> Optimization:
    config = OptimizerConfig(
        lr=1e-3, schedule="constant", clip=clip, nonfinite=nonfinite, max_skips=max_skips
    )
    return Optimization(network, config)


def step(optimization: Optimization, terms: dict[str, Tensor]) -> dict[str, float]:
    optimization.zero_grad()
    optimization.backward(terms)
    return optimization.step(" + ".join(terms), progress=0.0)


def gradient(network: nn.Module, loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True))


def norm(gradients: list[Tensor | None]) -> float:
    return torch.cat([g for g in gradients if g is not None]).norm().item()


def adamw(network: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.01)


# ---- several terms -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("consistency", "dmd"), ("dmd", "consistency")])
def test_norm_of_each_term_is_that_of_its_own_gradient(
    network: Network, names: tuple[str, str]
) -> None:
    first, second = names
    expected = {name: norm(gradient(network, loss)) for name, loss in network.terms().items()}
    terms = network.terms()
    metrics = step(optimization(network), {name: terms[name] for name in names})
    for name in names:
        assert metrics[f"grad_norm_{name}"] == pytest.approx(expected[name], rel=1e-12)
    ratio = expected[second] / expected[first]
    assert metrics[f"grad_ratio_{second}"] == pytest.approx(ratio, rel=1e-12)
    assert f"grad_ratio_{first}" not in metrics


def test_terms_are_minimised_by_the_gradient_of_their_sum(network: Network) -> None:
    joint = gradient(network, sum(network.terms().values(), torch.zeros(())))
    metrics = step(optimization(network), network.terms())
    for parameter, expected in zip(network.parameters(), joint, strict=True):
        if expected is None:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected)
    assert metrics["grad_norm"] == pytest.approx(norm(joint), rel=1e-12)


def test_terms_that_are_not_compared_take_one_backward_pass(network: Network) -> None:
    """Each pass reduces the gradient of sharded parameters once more."""
    passes: list[Tensor] = []
    network.both.register_post_accumulate_grad_hook(passes.append)
    for compare, expected in ((True, 2), (False, 1)):
        passes.clear()
        update = optimization(network)
        update.zero_grad()
        update.backward(network.terms(), compare=compare)
        assert len(passes) == expected
        total = gradient(network, torch.stack(list(network.terms().values())).sum())
        for parameter, g in zip(network.parameters(), total, strict=True):
            torch.testing.assert_close(parameter.grad, g)


def test_update_is_that_of_adamw_on_the_sum(network: Network) -> None:
    other = Network()
    other.load_state_dict(network.state_dict())
    ours, theirs = optimization(network), adamw(other)
    for _ in range(3):
        step(ours, network.terms())
        theirs.zero_grad()
        sum(other.terms().values(), torch.zeros(())).backward()
        for group in theirs.param_groups:
            group["lr"] = 1e-3 * ours.config.factor(ours.updates, 0.0)
        theirs.step()
    assert ours.updates == 3
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_term_has_no_norm_of_its_own(network: Network) -> None:
    metrics = step(optimization(network), {"dmd": network.terms()["dmd"]})
    assert set(metrics) == {"grad_norm", "clipped", "nonfinite_grads"}


# ---- clipping and non-finite gradients ---------------------------------------------------------


def test_clipping_scales_the_gradient_down_to_its_norm_and_is_counted(network: Network) -> None:
    before = norm(gradient(network, network.terms()["dmd"]))
    metrics = step(optimization(network, clip=before / 2), {"dmd": network.terms()["dmd"]})
    assert metrics["clipped"] == 1
    assert metrics["grad_norm"] == pytest.approx(before, rel=1e-12)
    assert norm([p.grad for p in network.parameters()]) == pytest.approx(before / 2, rel=1e-6)


@pytest.mark.parametrize("times", [2.0, math.inf])
def test_a_smaller_gradient_is_not_clipped(network: Network, times: float) -> None:
    expected = gradient(network, network.terms()["dmd"])
    metrics = step(
        optimization(network, clip=times * norm(expected)), {"dmd": network.terms()["dmd"]}
    )
    assert metrics["clipped"] == 0
    for parameter, value in zip(network.parameters(), expected, strict=True):
        assert value is None or torch.equal(value, parameter.grad)  # type: ignore[arg-type]


def terms_with_nonfinite_gradients(network: Network) -> dict[str, Tensor]:
    """√x at 0 has an infinite derivative and 0·√x a NaN: four elements, two of them shared."""
    with torch.no_grad():
        network.both[:2] = 0
        network.first[:1] = 0
        network.second[:1] = 0
    terms = network.terms()
    terms["consistency"] = terms["consistency"] + network.both[0].abs().sqrt() * 0
    terms["consistency"] = terms["consistency"] + network.both[1].abs().sqrt() * network.first[0]
    terms["dmd"] = terms["dmd"] + network.second[0].sqrt()
    return terms


def test_nonfinite_elements_become_zero_and_are_counted(network: Network) -> None:
    terms = terms_with_nonfinite_gradients(network)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    metrics = step(optimization(network, nonfinite="zero"), terms)
    both, second = network.get_parameter("both"), network.get_parameter("second")
    assert metrics["nonfinite_grads"] == 3
    assert both.grad is not None
    assert second.grad is not None
    assert both.grad[:2].tolist() == [0, 0]
    assert second.grad[0] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    finite = [p.grad for p in network.parameters() if p.grad is not None]
    assert metrics["grad_norm"] == pytest.approx(torch.cat(finite).norm().item(), rel=1e-12)
    assert not torch.equal(both[2:], weights["both"][2:])


def test_nonfinite_gradients_stop_the_run_before_the_update(network: Network) -> None:
    terms = terms_with_nonfinite_gradients(network)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    ours = optimization(network)
    with pytest.raises(RunError, match=r"the consistency \+ dmd gradient is nan"):
        step(ours, terms)
    assert ours.updates == 0
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_a_nonfinite_loss_stops_the_run(network: Network) -> None:
    ours = optimization(network)
    with pytest.raises(RunError, match="the dmd loss is nan"):
        ours.step("dmd", progress=0.0, problem="the dmd loss is nan")
    assert ours.updates == 0


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_updates_with_a_nonfinite_loss_are_skipped_and_counted(
    network: Network, nonfinite: Nonfinite
) -> None:
    ours = optimization(network, nonfinite=nonfinite, max_skips=2)
    step(ours, network.terms())
    assert ours.updates == 1
    weights = [p.detach().clone() for p in network.parameters()]
    for count in (1, 2):
        metrics = ours.step("dmd", progress=0.0, problem="the dmd loss is nan")
        assert metrics["skipped"] == count
    assert all(map(torch.equal, network.parameters(), weights))
    with pytest.raises(RunError, match="the dmd loss is nan, and so were 2 updates before"):
        ours.step("dmd", progress=0.0, problem="the dmd loss is nan")
    step(ours, network.terms())
    assert ours.updates == 2
    assert ours.step("dmd", progress=0.0, problem="the dmd loss is nan")["skipped"] == 1


def test_nonfinite_gradients_skip_the_update(network: Network) -> None:
    ours = optimization(network, nonfinite="skip")
    terms = terms_with_nonfinite_gradients(network)
    weights = [p.detach().clone() for p in network.parameters()]
    assert step(ours, terms)["skipped"] == 1
    assert all(map(torch.equal, network.parameters(), weights))


# ---- learning rate -----------------------------------------------------------------------------


def test_cosine_schedule_falls_from_the_peak_to_zero_over_the_run() -> None:
    config = OptimizerConfig(lr=1.0)
    assert config.factor(0, 0.0) == 1
    assert config.factor(5, 0.5) == pytest.approx(0.5)
    assert config.factor(5, 1.0) == pytest.approx(0)


def test_warm_up_counts_the_updates_of_the_network() -> None:
    config = OptimizerConfig(lr=1.0, warmup=10)
    assert [config.factor(n, 0.0) for n in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    constant = OptimizerConfig(lr=1.0, warmup=10, schedule="constant")
    factors = [constant.factor(n, 0.99) for n in (0, 5, 10, 11)]
    assert factors == pytest.approx([1e-6, 0.5, 1.0, 1.0], abs=1e-6)


def test_constant_schedule_without_warm_up_is_always_at_the_peak() -> None:
    config = OptimizerConfig(lr=1.0, schedule="constant")
    assert config.factor(0, 0.0) == config.factor(1000, 0.999) == 1


def test_learning_rate_of_an_update_is_lr_times_the_factor(network: Network) -> None:
    config = OptimizerConfig(lr=0.5, warmup=4, schedule="constant", weight_decay=0.0)
    ours = Optimization(network, config)
    for update in range(6):
        ours.zero_grad()
        ours.backward({"dmd": network.terms()["dmd"]})
        ours.step("dmd", progress=update / 6)
        assert ours.optimizer.param_groups[0]["lr"] == 0.5 * config.factor(update, update / 6)


def test_a_restored_optimizer_takes_the_same_update(network: Network) -> None:
    ours = optimization(network)
    step(ours, network.terms())
    other = Network()
    other.load_state_dict(network.state_dict())
    restored = optimization(other)
    restored.load_state_dict(deepcopy(ours.state_dict()))
    assert restored.updates == 1
    step(ours, network.terms())
    step(restored, other.terms())
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


FAILING_PASS = """
import torch
from rcm.training.optimization import Optimization, OptimizerConfig

def unpack(_):
    raise RuntimeError("a block failed")

def loss():
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = layer(torch.ones(1, 2))
        return torch.cat([out.cos(), out.sin()]).sum()

layer = torch.nn.Linear(2, 2)
Optimization(layer, OptimizerConfig(lr=1.0)).backward({"loss": loss()})
"""


def test_a_process_ends_normally_after_a_failed_backward_pass() -> None:
    """PyTorch 2.15 alone crashes at exit where saved tensors have hooks, as in checkpoints."""
    command = [sys.executable, "-c", FAILING_PASS]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.endswith("RuntimeError: a block failed\n")
