"""The trainer steps one network at a time, keeps its averages, and restores all of it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor, nn

from rcm.data.dataset import Dataset
from rcm.errors import OptionError, RunError
from rcm.losses.flow_matching import flow_matching_loss
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.method import (
    SCRATCH,
    TEACHER,
    Averaged,
    Distillation,
    Frozen,
    Losses,
    Role,
    Step,
    Trained,
)
from rcm.training.optimization import OptimizerConfig
from rcm.training.trainer import Trainer, build_networks, load_into
from rcm.trigflow import Network
from tests.rcm.analytic_networks import SmoothNetwork

TIMES = LogNormal(mean=0.0, std=1.0)


@dataclass(frozen=True, kw_only=True)
class TwoNetworks(Distillation):
    """Trains the student and then a critic, with a target that follows the student."""

    max_steps: int = 1
    loss_for: tuple[str, ...] = ("student", "critic")

    def roles(self) -> dict[str, Role]:
        return {
            "student": Trained(optimizer=self.optimizer, ema=self.ema, start=self.start),
            "critic": Trained(optimizer=self.optimizer, start=SCRATCH),
            "target": Averaged(of="student", ema=EMAConfig(decay=0.5)),
            "teacher": Frozen(),
        }

    def losses(self, step: Step) -> Losses:
        for role in self.loss_for:
            t = step.times(TIMES)
            net = step.network(role)
            yield role, {"flow": flow_matching_loss(net, step.x0, step.noise(), t, step.condition)}

    def sample(
        self, student: Network, noise: Tensor, condition: object, steps: int, source: Generator
    ) -> Tensor:
        raise NotImplementedError


def method(**settings: object) -> TwoNetworks:
    return TwoNetworks(
        iterations=10,
        batch=4,
        optimizer=OptimizerConfig(lr=0.01),
        ema=EMAConfig(decay=0.9),
        **settings,  # type: ignore[arg-type]
    )


def data() -> Dataset:
    samples = torch.randn(16, 3, generator=Generator().manual_seed(1))
    return Dataset(samples, torch.zeros(16, dtype=torch.int64), 1)


def build() -> nn.Module:
    return SmoothNetwork(3, width=8)


def trainer(
    chosen: TwoNetworks, network: Callable[[], nn.Module] = build, accumulation: int = 1
) -> Trainer:
    torch.manual_seed(0)
    teacher = network().state_dict()

    def make(start: str) -> nn.Module:
        made = network()
        if start == TEACHER:
            made.load_state_dict(teacher)
        return made

    networks = build_networks(chosen.roles(), make)
    return Trainer("student", chosen, networks, data(), seed=0, accumulation=accumulation)


def flat(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def test_roles_start_from_the_teacher_or_from_scratch() -> None:
    networks = trainer(method()).networks
    teacher = flat(networks["teacher"])
    assert torch.equal(flat(networks["student"]), teacher)
    assert torch.equal(flat(networks["target"]), teacher)
    assert not torch.equal(flat(networks["critic"]), teacher)
    trained = {name for name, net in networks.items() if next(net.parameters()).requires_grad}
    assert trained == {"student", "critic"}


def test_a_role_is_stepped_before_the_next_loss_is_computed() -> None:
    seen: list[Tensor] = []

    class Watching(TwoNetworks):
        def losses(self, step: Step) -> Losses:
            for update in super().losses(step):
                seen.append(flat(step.student))  # type: ignore[arg-type]
                yield update

    training = trainer(Watching(**vars(method())))
    training.step()
    before, between = seen
    assert not torch.equal(before, between)
    assert torch.equal(between, flat(training.networks["student"]))


def test_the_target_is_the_moving_average_of_the_student() -> None:
    training = trainer(method())
    student, target = training.networks["student"], training.networks["target"]
    expected = flat(student)
    for _ in range(3):
        training.step()
        expected = 0.5 * expected + 0.5 * flat(student)
        torch.testing.assert_close(flat(target), expected)
    average = torch.cat([v.flatten() for v in training.weights().values()])
    assert not torch.equal(average, flat(student))


def test_a_restored_trainer_takes_the_same_steps() -> None:
    whole, first = trainer(method()), trainer(method())
    for _ in range(3):
        whole.step(), first.step()
    state = first.state_dict()
    averages = {name.split(".")[1] for name in state if name.startswith("averages.")}
    assert averages == {"student", "target"}
    second = trainer(method())
    second.load_state_dict(state)
    assert second.iteration == 3
    for _ in range(3):
        assert second.step() == whole.step()
    for role in whole.networks:
        assert torch.equal(flat(second.networks[role]), flat(whole.networks[role])), role


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = trainer(method()), trainer(method(), accumulation=4)
    for _ in range(3):
        expected, found = whole.step(), parts.step()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name
    for role in whole.networks:
        torch.testing.assert_close(flat(parts.networks[role]), flat(whole.networks[role]))


def test_micro_batches_that_do_not_divide_the_batch_raise() -> None:
    with pytest.raises(OptionError, match=r"the batch is 4; it must be a multiple of 3"):
        trainer(method(), accumulation=3)


def test_metrics_of_the_result_have_no_prefix() -> None:
    metrics = trainer(method()).step()
    assert {"loss", "grad_norm", "clipped", "critic_loss", "critic_grad_norm"} <= metrics.keys()


def test_a_loss_for_a_role_that_is_not_trained_raises() -> None:
    with pytest.raises(RunError, match="a loss for 'teacher', but trains only student, critic"):
        trainer(method(loss_for=("teacher",))).step()


def test_weights_of_another_shape_raise_in_one_line() -> None:
    weights = SmoothNetwork(3, width=16).state_dict()
    with pytest.raises(RunError, match="weights of the run do not fit the model") as error:
        load_into(build(), weights, "the weights of the run")
    assert "\n" not in str(error.value)


def test_a_network_that_rounds_its_time_is_refused() -> None:
    class Rounding(SmoothNetwork):
        def forward(
            self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
        ) -> Tensor:
            return super().forward(x, t.bfloat16().to(t.dtype), condition, end)

    with pytest.raises(RunError, match="the student cannot be used: the network rounds its time"):
        trainer(method(), lambda: Rounding(3, width=8))
