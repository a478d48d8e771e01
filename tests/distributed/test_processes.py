"""Ranks start and end together: whatever ends one ends all, soon, with a line that names it.

The heartbeat of rank_program counts a rank as dead after one second.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from rcm.distributed import rendezvous
from rcm.distributed.processes import Processes, is_main, processes
from rcm.errors import OptionError
from tests.distributed.launched_ranks import LIMIT, Ranks, Torchrun, free_port
from tests.distributed.rank_program import HEARTBEAT

pytestmark = pytest.mark.xdist_group("ranks")

HOST = socket.gethostname()
SILENT_1 = f"no heartbeat for 1 s of rank 1 on {HOST}:"


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path / "ranks")
    yield started
    started.kill()


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[type[Torchrun]]:
    started = []

    def start(*arguments: str, ranks: int = 2) -> Torchrun:
        started.append(Torchrun(tmp_path, *arguments, ranks=ranks))
        return started[-1]

    yield start
    for run in started:
        run.kill()


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in rendezvous.NAMES:
        monkeypatch.delenv(name, raising=False)


# A single process


def test_a_single_process_needs_no_group() -> None:
    with processes("cpu") as alone:
        assert alone == Processes(0, 1, 0, torch.device("cpu"))
        assert alone.rank == 0 and is_main()
        assert not dist.is_initialized()


def test_a_single_process_can_have_a_group_for_fsdp() -> None:
    with processes("cpu", always_group=True) as alone:
        assert alone.size == dist.get_world_size() == 1
        layer = nn.Linear(3, 2)
        expected = layer.weight.detach().clone()
        fully_shard(layer)
        layer(torch.ones(1, 3)).sum().backward()
        assert torch.equal(layer.weight.full_tensor(), expected)
    assert not dist.is_initialized()


def test_the_group_of_a_single_process_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), processes("cpu", always_group=True):
        raise ZeroDivisionError
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "sets WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT but not RANK"),
        ({"LOCAL_RANK": ""}, "but not LOCAL_RANK"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be an integer"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0; it must be at least 1"),
        ({"RANK": "2"}, r"RANK is 2; it must be in 0\.\.1"),
        ({"LOCAL_RANK": "1"}, r"LOCAL_RANK is 1; it must be in 0\.\.0"),
        ({"MASTER_PORT": "70000"}, r"MASTER_PORT is 70000; it must be in 1\.\.65535"),
    ],
)
def test_an_incomplete_environment_is_an_option_error(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ("0", "2", "0", "127.0.0.1", "29500")
    environment = {**dict(zip(rendezvous.NAMES, values, strict=True)), **changes}
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=message), processes("cpu"):
        pass


def test_a_leftover_master_address_does_not_make_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    with processes("cpu") as alone:
        assert alone.size == 1


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cpu:0x"])
def test_an_unknown_device_is_an_option_error(device: str) -> None:
    with pytest.raises(OptionError, match="it must be cpu, cuda or cuda:N"), processes(device):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="finds no CUDA device"), processes("cuda"):
        pass


# How ranks end


def test_ranks_end_normally_even_if_one_is_late(ranks: Ranks) -> None:
    ranks.start("end-late", size=3)
    assert ranks.codes() == [0, 0, 0]
    assert ranks.errors() == ["", "", ""]


def test_exit_zero_is_a_normal_end(ranks: Ranks) -> None:
    ranks.start("exit")
    assert ranks.codes() == [0, 0]
    assert ranks.errors() == ["", ""]


@pytest.mark.parametrize("action", ["work", "sleep"])
def test_a_killed_rank_ends_the_others(ranks: Ranks, action: str) -> None:
    ranks.start(action, size=3)
    ranks.wait_until_running()
    ranks.signal(1, signal.SIGKILL)
    assert ranks.codes() == [1, -signal.SIGKILL, 1]
    first, _, third = ranks.errors()
    for rank, error in ((0, first), (2, third)):
        assert error.startswith(f"error: {SILENT_1}")
        assert error.endswith(f"(rank {rank} on {HOST} ends)\n")
        assert error.count("\n") == 1


@pytest.mark.parametrize("action", ["work", "sleep"])
def test_a_killed_rank_0_ends_the_others(ranks: Ranks, action: str) -> None:
    ranks.start(action)
    ranks.wait_until_running()
    ranks.signal(0, signal.SIGKILL)
    assert ranks.codes() == [-signal.SIGKILL, 1]
    assert f"rank 0 or torchrun on {HOST} has ended" in ranks.errors()[1]


def test_a_rank_that_hangs_ends_the_others_and_then_itself(ranks: Ranks) -> None:
    ranks.start("work")
    ranks.wait_until_running()
    ranks.signal(1, signal.SIGSTOP)
    ranks.processes[0].join(LIMIT)
    ranks.signal(1, signal.SIGCONT)
    assert ranks.codes() == [1, 1]
    first, second = ranks.errors()
    assert first.startswith(f"error: {SILENT_1}")
    assert "the connection to the store of the run was lost" in second


def test_a_rank_0_that_hangs_ends_the_others(ranks: Ranks) -> None:
    ranks.start("work")
    ranks.wait_until_running()
    ranks.signal(0, signal.SIGSTOP)
    ranks.processes[1].join(LIMIT)
    ranks.signal(0, signal.SIGKILL)
    assert ranks.codes() == [-signal.SIGKILL, 1]
    assert (
        f"store of the run has not answered for 1 s: rank 0 or torchrun on {HOST} hangs"
        in (ranks.errors()[1])
    )


def test_ranks_that_are_suspended_together_blame_nobody(ranks: Ranks) -> None:
    ranks.start("end-late")
    ranks.wait_until_running()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            ranks.signal(rank, number)
        time.sleep(1.5 * HEARTBEAT.timeout)
    assert ranks.codes() == [0, 0]
    assert ranks.errors() == ["", ""]


def test_sigterm_ends_a_rank_as_usual(ranks: Ranks) -> None:
    ranks.start("sleep")
    ranks.wait_until_running()
    ranks.signal(1, signal.SIGTERM)
    assert ranks.codes() == [1, -signal.SIGTERM]


def test_an_interrupt_of_all_ranks_is_no_failure(ranks: Ranks) -> None:
    ranks.start("sleep")
    ranks.wait_until_running()
    for rank in (0, 1):
        ranks.signal(rank, signal.SIGINT)
    assert ranks.codes() == [130, 130]
    assert ranks.errors() == ["", ""]


@pytest.mark.parametrize(
    ("action", "message", "code"),
    [
        ("run-error", "the disk is full", 1),
        ("option-error", "the folder is missing", 2),
    ],
)
def test_an_error_of_a_rank_ends_the_others(
    ranks: Ranks, action: str, message: str, code: int
) -> None:
    ranks.start(action, size=3)
    assert ranks.codes() == [1, code, 1]
    first, second, third = ranks.errors()
    assert first == f"error: rank 1 on {HOST} failed: {message} (rank 0 on {HOST} ends)\n"
    assert third == f"error: rank 1 on {HOST} failed: {message} (rank 2 on {HOST} ends)\n"
    assert second.startswith(f"error: rank 1 on {HOST}: the")


def test_an_unexpected_error_keeps_its_traceback(ranks: Ranks) -> None:
    ranks.start("bug")
    assert ranks.codes() == [1, 1]
    first, second = ranks.errors()
    assert "rank 1 on " in first and "failed: ZeroDivisionError: not caught" in first
    assert second == "Traceback (most recent call last):\nZeroDivisionError: not caught\n"


def test_an_agreed_error_is_printed_by_rank_0(ranks: Ranks) -> None:
    ranks.start("agreed")
    assert ranks.codes() == [2, 2]
    assert ranks.errors() == [f"error: rank 1 on {HOST}: the folder is empty\n", ""]


def test_an_agreed_unexpected_error_keeps_its_traceback(ranks: Ranks) -> None:
    ranks.start("agreed-bug", size=3)
    assert ranks.codes() == [1, 1, 1]
    first, second, third = ranks.errors()
    assert f"RuntimeError: rank 1 on {HOST}: not caught" in first
    assert "ZeroDivisionError: not caught" in second
    assert third == ""


def test_the_same_error_of_all_ranks_is_printed_once(ranks: Ranks) -> None:
    ranks.start("together", size=3)
    assert ranks.codes() == [2, 2, 2]
    assert sorted(map(bool, ranks.errors())) == [False, False, True]
    assert "the mesh does not fit" in "".join(ranks.errors())


# How ranks fail to start


def test_a_missing_gpu_of_a_rank_is_an_error_of_the_run(ranks: Ranks) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    ranks.start("end", device="cuda")
    assert ranks.codes() == [2, 2]
    errors = "".join(ranks.errors())
    assert errors.count("error") == 1
    assert "device is 'cuda', but PyTorch finds no CUDA device" in errors


def test_a_port_in_use_is_an_error(ranks: Ranks) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ranks.port = other.getsockname()[1]
        ranks.start("end", start_timeout=2)
        assert ranks.codes() == [1, 1]
    first, second = ranks.errors()
    assert f"port {ranks.port} on {HOST} is in use by another program" in first
    assert "within 2 s: another program uses this port" in second


def test_a_rank_that_does_not_start_is_named(ranks: Ranks) -> None:
    ranks.start("end", size=4, ranks=(0, 2), start_timeout=3)
    assert set(ranks.codes()) == {1}
    assert "2 of 4 ranks have not started within 3 s: 1, 3." in ranks.errors()[0]


def test_a_missing_rank_0_is_an_error(ranks: Ranks) -> None:
    ranks.start("end", ranks=(1,), start_timeout=1)
    assert ranks.codes() == [1]
    error = ranks.errors()[0]
    assert f"rank 1 on {HOST} found no store of the run at 127.0.0.1:{ranks.port}" in error
    assert "nothing answers there" in error


def test_two_processes_of_the_same_rank_are_an_error(ranks: Ranks) -> None:
    ranks.start("end", size=3, ranks=(0, 1, 1), start_timeout=3)
    assert set(ranks.codes()) == {1}
    assert "two processes have RANK=1" in "".join(ranks.errors())


# torchrun, whose agent ends the ranks of its own machine when one has ended


def test_torchrun_ends_normally(torchrun: type[Torchrun]) -> None:
    code, output = torchrun("end-late", "--standalone", "--nproc-per-node=2").end()
    assert code == 0, output
    assert "error" not in output.lower()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_torchrun_names_a_killed_rank_and_leaves_no_process(
    torchrun: type[Torchrun], rank: int
) -> None:
    run = torchrun("work", "--standalone", "--nproc-per-node=2")
    run.wait_until_running()
    os.kill(run.pid(rank), signal.SIGKILL)
    code, output = run.end()
    assert code == 1
    assert f"exitcode  : -9 (pid: {run.pid(rank)})" in output
    assert f"rank      : {rank} (local_rank: {rank})" in output
    assert "[rank" not in output  # a traceback


@pytest.mark.slow
def test_a_rank_that_hangs_under_torchrun(torchrun: type[Torchrun]) -> None:
    run = torchrun("work", "--standalone", "--nproc-per-node=2")
    run.wait_until_running()
    os.kill(run.pid(1), signal.SIGSTOP)
    # torchrun kills the stopped rank 30 s after the other has ended.
    code, output = run.end()
    assert code == 1
    assert f"error: {SILENT_1}" in output


@pytest.mark.slow
@pytest.mark.parametrize("action", ["run-error", "bug", "agreed", "together"])
def test_an_error_of_a_rank_under_torchrun(torchrun: type[Torchrun], action: str) -> None:
    code, output = torchrun(action, "--standalone", "--nproc-per-node=2").end()
    assert code == 1
    assert f"rank {0 if action == 'together' else 1} on {HOST}" in output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_ranks_of_another_machine(
    torchrun: type[Torchrun], rank: int
) -> None:
    port = free_port()
    options = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1")
    nodes = [
        torchrun("work", *options, f"--master-port={port}", f"--node-rank={node}")
        for node in (0, 1)
    ]
    nodes[0].wait_until_running()
    os.kill(nodes[0].pid(rank), signal.SIGKILL)
    outcomes = [node.end() for node in nodes]
    assert [code for code, _ in outcomes] == [1, 1]
    survivor = outcomes[1 - rank][1]
    assert (SILENT_1 if rank == 1 else f"rank 0 or torchrun on {HOST} has ended") in survivor


@pytest.mark.slow
def test_a_port_in_use_under_torchrun(torchrun: type[Torchrun]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        options = ("--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}")
        code, output = torchrun("end", *options).end()
    assert code == 1
    assert "EADDRINUSE" in output
