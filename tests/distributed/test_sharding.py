"""A student trained on shards has the losses, gradients and averages of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rcm.distributed.sharding import accumulating_gradients, reset_iteration, reshard, shard
from tests.distributed.ranks import run_on_ranks
from tests.distributed.sharding_cases import (
    FOUR_RANKS,
    TWO_RANKS,
    Case,
    Named,
    averages,
    dit_step,
    four_ranks,
    output,
    student_step,
    trigflow_network,
    two_ranks,
    wan,
)

pytestmark = pytest.mark.xdist_group("ranks")

TOLERANCE = 2e-6  # single weights, whose gradients are sums over other parts of the batch
ids = {"ids": lambda case: case.name}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(two_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(four_ranks, 4, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'r'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def in_one_process(dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The step on the whole batch, without shards."""
    student, teacher = wan().to(dtype), wan(seed=1).requires_grad_(False).to(dtype)
    return student_step(student, teacher, Case("", (1,), 1, dtype))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def worst(found: Named, expected: Named) -> float:
    assert found.keys() == expected.keys()
    return max(distance(found[name], expected[name]) for name in expected)


# ---- steps -------------------------------------------------------------------------------------


def check_step(case: Case, by_rank: list[dict[str, Any]]) -> None:
    exact = in_one_process()
    allowed = {"values": TOLERANCE, "jvps": TOLERANCE, "gradients": TOLERANCE}
    if case.dtype is not None:
        low = in_one_process(case.dtype)
        allowed = {
            "values": 2 * distance(low["values"], exact["values"]),
            "jvps": 2 * distance(low["jvps"], exact["jvps"]),
            "gradients": 2 * worst(low["gradients"], exact["gradients"]),
        }
    parts = [step for i, step in enumerate(by_rank) if i % case.sharers == 0]
    for name in ("values", "jvps"):
        found = torch.cat([step[name] for step in parts])
        assert distance(found, exact[name]) <= allowed[name], name
    # The ranks that share samples compute the same loss here, and their gradients are added.
    expected = {name: case.sharers * g for name, g in exact["gradients"].items()}
    for step in by_rank:
        assert worst(step["gradients"], expected) <= allowed["gradients"]


@pytest.mark.parametrize("case", TWO_RANKS, **ids)
def test_step_equals_that_of_one_process(case: Case, on_two: list[dict[str, Any]]) -> None:
    check_step(case, [found["steps"][case.name] for found in on_two])


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR_RANKS, **ids)
def test_step_on_four_ranks_equals_that_of_one_process(
    case: Case, on_four: list[dict[str, Any]]
) -> None:
    check_step(case, [found["steps"][case.name] for found in on_four])


def test_step_on_a_mesh_of_one_rank_equals_one_without_shards(one_rank: DeviceMesh) -> None:
    student, teacher = wan(), wan(seed=1).requires_grad_(False)
    for model in (student, teacher):
        shard(model, model.blocks, one_rank, data_size=1)
    found, expected = student_step(student, teacher, Case("", (1,), 1)), in_one_process()
    assert torch.equal(found["values"], expected["values"])
    assert torch.equal(found["jvps"], expected["jvps"])
    # Hooks of FSDP2 change the order in which autograd adds the gradients of the text.
    assert worst(found["gradients"], expected["gradients"]) <= 5e-7


def test_step_after_a_failed_one_is_not_affected(on_two: list[dict[str, Any]]) -> None:
    check_step(Case("", (2, 1), 2, micro_batches=2), [found["recovered"] for found in on_two])


def test_bfloat16_step_of_the_dit_equals_that_of_one_process(on_two: list[dict[str, Any]]) -> None:
    exact, low = dit_step(None, torch.float32), dit_step(None, torch.bfloat16)
    values = torch.cat([found["dit"]["values"] for found in on_two])
    assert distance(values, exact["values"]) <= 2 * distance(low["values"], exact["values"])
    allowed = 2 * worst(low["gradients"], exact["gradients"])
    for found in on_two:
        assert worst(found["dit"]["gradients"], exact["gradients"]) <= allowed


def test_copies_communicate_in_the_last_micro_batch_only(on_two: list[dict[str, Any]]) -> None:
    for found in on_two:
        first, last = found["all-reduces"]
        assert first == 0
        assert last == 3  # one for each block, one for the rest


# ---- averages ----------------------------------------------------------------------------------


def check_averages(case: Case, by_rank: list[dict[str, dict[str, Named]]]) -> None:
    """The average has float32 weights under mixed precision too."""
    expected = averages(wan(), None)
    tolerance = TOLERANCE if case.dtype is None else 2e-2
    for found in by_rank:
        assert {x.dtype for x in found["average"].values()} == {torch.float32}
        assert worst(found["average"], expected["average"]) <= TOLERANCE
        assert worst(found["outputs"], expected["outputs"]) <= tolerance
        assert torch.equal(found["outputs"]["own"], found["outputs"]["own again"])
        assert torch.equal(found["outputs"]["averaged"], found["outputs"]["copied"])


@pytest.mark.parametrize("case", [c for c in TWO_RANKS if c.micro_batches == 1], **ids)
def test_average_equals_that_of_one_process(case: Case, on_two: list[dict[str, Any]]) -> None:
    check_averages(case, [found["averages"][case.name] for found in on_two])


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in FOUR_RANKS if c.micro_batches == 1], **ids)
def test_average_on_four_ranks_equals_that_of_one_process(
    case: Case, on_four: list[dict[str, Any]]
) -> None:
    check_averages(case, [found["averages"][case.name] for found in on_four])


# ---- helpers -----------------------------------------------------------------------------------


def test_teacher_forgets_its_forward_passes(on_two: list[dict[str, Any]]) -> None:
    for found in on_two:
        before, after = found["teacher"]
        assert before > 0
        assert after == 0


def test_parameters_are_shards_again_after_reshard(one_rank: DeviceMesh) -> None:
    model = wan()
    shard(model, model.blocks, one_rank, data_size=1, param_dtype=torch.bfloat16)
    output(trigflow_network(model, torch.bfloat16))
    assert model.proj_out.weight.dtype == torch.bfloat16
    reshard(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_helpers_leave_a_whole_network_as_it_is() -> None:
    network = nn.Linear(2, 2)
    with accumulating_gradients(network):
        network(torch.ones(1, 2)).sum().backward()
    before = network.weight.grad
    reshard(network)
    reset_iteration(network)
    assert network.weight.grad is before


# ---- errors ------------------------------------------------------------------------------------


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_mesh_that_does_not_fit_raises(one_rank: DeviceMesh) -> None:
    network = two_layers()
    with pytest.raises(ValueError, match="the mesh has 3 dimensions"):
        shard(network, network, init_device_mesh("cpu", (1, 1, 1)), data_size=1)
    with pytest.raises(ValueError, match="two dimensions of the mesh have no names"):
        shard(network, network, init_device_mesh("cpu", (1, 1)), data_size=1)
    with pytest.raises(ValueError, match="data_size is 2; it must divide the 1 ranks"):
        shard(network, network, one_rank, data_size=2)
    with pytest.raises(ValueError, match="data_size is 0"):
        shard(network, network, one_rank, data_size=0)


def test_blocks_that_do_not_fit_raise(one_rank: DeviceMesh) -> None:
    network = two_layers()
    with pytest.raises(ValueError, match="block 1, a Tanh, is no submodule of Sequential"):
        shard(network, [network[0], nn.Tanh()], one_rank, data_size=1)
    with pytest.raises(ValueError, match="block 0, a Sequential, is no submodule"):
        shard(network, [network], one_rank, data_size=1)
    with pytest.raises(ValueError, match="more than once"):
        shard(network, [network[0], network[0]], one_rank, data_size=1)
    shard(network, network, one_rank, data_size=1)
    with pytest.raises(ValueError, match="sharded already"):
        shard(network, [], one_rank, data_size=1)


def test_weights_that_are_no_masters_raise(one_rank: DeviceMesh) -> None:
    network = two_layers().bfloat16()
    with pytest.raises(ValueError, match=r"0\.weight has dtype torch\.bfloat16; all weights must"):
        shard(network, network, one_rank, data_size=1)
    network = two_layers()
    network[1].bias.requires_grad_(False).data = torch.zeros(2).half()
    with pytest.raises(ValueError, match=r"call network\.float\(\)"):
        shard(network, network, one_rank, data_size=1)
    network = two_layers()
    network[1].weight = network[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one parameter"):
        shard(network, network, one_rank, data_size=1)


def test_copies_of_one_shard_in_float64_raise(on_two: list[dict[str, Any]]) -> None:
    for found in on_two:
        assert "float64, and the mesh (2, 1) has copies of one shard" in found["float64 error"]


def test_copies_need_different_samples(on_two: list[dict[str, Any]]) -> None:
    for found in on_two:
        assert "it must be a multiple of the 2 copies" in found["copies error"]
