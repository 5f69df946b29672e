"""A process that ends takes the others with it, and they say which it was; one that stays away is warned of."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hf_matryoshka_sae.training.run.peers import is_running
from hf_matryoshka_sae.training.run.watchdog import Watchdog

from ...processes import FORKS


def work(rank: int, world: int, folder: Path, job: str, options: dict) -> None:
    """One process of a run: it says in `log-<rank>` what a real one would say on stderr."""
    log = open(folder / f"log-{rank}", "w", buffering=1)
    os.dup2(log.fileno(), 2)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, force=True)
    if options.get("machines"):
        socket.gethostname = lambda: options["machines"][rank]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    accelerator = SimpleNamespace(process_index=rank, num_processes=world)
    with Watchdog(accelerator, folder, options.get("patience")) as watchdog:
        (folder / f"ready-{rank}").touch()
        JOBS[job](rank, watchdog)


def reduce_for_ever(rank, watchdog):
    for step in range(1_000_000):
        dist.all_reduce(torch.ones(1))
        watchdog.progress(step + 1)
        time.sleep(0.01)


def sleep_for_ever(rank, watchdog):
    time.sleep(1000)


def fail_in_one(rank, watchdog):
    if rank == 1:
        raise ValueError("out of luck")
    time.sleep(1000)


def end_one_after_another(rank, watchdog):
    time.sleep(1.5 * rank)


def end_in_one_while_others_reduce(rank, watchdog):
    if rank == 1:
        os._exit(9)
    dist.all_reduce(torch.ones(1))


JOBS = {
    job.__name__: job
    for job in (reduce_for_ever, sleep_for_ever, fail_in_one, end_one_after_another, end_in_one_while_others_reduce)
}


class Run:
    """Processes that do a job; they have imported everything when they start."""

    def __init__(self, folder: Path, world: int, job: str, **options):
        self.folder = folder
        self.processes = [
            FORKS.Process(target=work, args=(rank, world, folder, job, options)) for rank in range(world)
        ]
        for process in self.processes:
            process.start()
        self.wait(lambda: all((folder / f"ready-{rank}").exists() for rank in range(world)))

    def wait(self, happened, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, [self.log(rank)[-2000:] for rank in range(len(self.processes))]
            time.sleep(0.05)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}").read_text()

    def name(self, rank: int) -> str:
        return f"Process {rank} of {len(self.processes)} (pid {self.processes[rank].pid} on {socket.gethostname()})"

    def finish(self, seconds: float = 60) -> list[int]:
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.processes]


@pytest.fixture
def start(tmp_path):
    runs = []

    def new(*arguments, **options) -> Run:
        runs.append(Run(tmp_path, *arguments, **options))
        return runs[-1]

    yield new
    for process in (process for run in runs for process in run.processes):
        process.kill()
        process.join()


def assert_named(run: Run, gone: int, ranks) -> None:
    for rank in ranks:
        said = run.log(rank)
        assert f"{run.name(gone)} has ended without a word; it was killed, or its machine is gone." in said, said
        assert " and process " not in said


@pytest.mark.parametrize("killed", [0, 2])
def test_the_process_that_was_killed_is_the_one_that_is_named(killed, start, tmp_path):
    (tmp_path / "checkpoint-00000004").mkdir()
    run = start(4, "reduce_for_ever")
    run.send(killed, signal.SIGKILL)
    assert run.finish(40) == [-9 if rank == killed else 1 for rank in range(4)]
    others = [rank for rank in range(4) if rank != killed]
    assert_named(run, killed, others)
    path = tmp_path / "checkpoint-00000004"
    assert f"The last checkpoint is {path}: run the same command again to go on from there." in run.log(others[0])


@pytest.mark.release
def test_whoever_looks_late_still_names_the_first_that_was_killed(start):
    """A process that slept while the others noticed, told each other and ended."""
    run = start(4, "reduce_for_ever")
    run.send(3, signal.SIGSTOP)
    run.send(1, signal.SIGKILL)
    run.wait(lambda: not is_running(run.processes[2].pid))
    run.send(3, signal.SIGCONT)
    assert run.finish(40) == [1, -9, 1, 1]
    assert_named(run, 1, [0, 2, 3])


@pytest.mark.release
def test_a_process_that_waits_for_ever_is_ended(start):
    run = start(2, "sleep_for_ever")
    run.send(1, signal.SIGKILL)
    assert run.finish(40) == [1, -9]
    assert_named(run, 1, [0])
    assert "No checkpoint was saved yet" in run.log(0)


@pytest.mark.release
def test_a_machine_of_which_nothing_is_heard_is_gone_where_an_error_points_to_a_loss(start):
    """Process 1, alone on its machine, is killed: nobody there can say so, but a connection to it breaks."""
    run = start(3, "reduce_for_ever", machines=["one", "two", "one"])
    run.send(1, signal.SIGKILL)
    assert run.finish(40) == [1, -9, 1]
    for rank in (0, 2):
        assert f"Process 1 of 3 (pid {run.processes[1].pid} on two) has ended without a word" in run.log(rank)


@pytest.mark.release
def test_an_error_is_told_to_all(start):
    run = start(2, "fail_in_one")
    assert run.finish(40) == [1, 1]
    assert "Process 1 of 2 failed: out of luck" in run.log(0) and "No checkpoint was saved yet" in run.log(0)


@pytest.mark.slow
def test_who_ends_well_first_is_not_missed(start):
    run = start(3, "end_one_after_another")
    assert run.finish(40) == [0, 0, 0]
    assert not any("rror" in run.log(rank) or "WARNING" in run.log(rank) for rank in range(3))


@pytest.mark.release
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_is_named_and_waited_for(stopped, start):
    other = 1 - stopped
    run = start(2, "reduce_for_ever", patience=2.0)
    time.sleep(0.5)
    run.send(stopped, signal.SIGSTOP)
    run.wait(lambda: "WARNING" in run.log(other))
    said = run.log(other)
    assert f"{run.name(stopped)} has not answered for" in said
    assert f"it is stopped (`kill -CONT {run.processes[stopped].pid}` lets it go on)" in said
    time.sleep(1.5)
    assert run.log(other).count("WARNING") == 1  # once is enough for a while
    run.send(stopped, signal.SIGCONT)
    run.wait(lambda: "answers again" in run.log(other))
    assert all(is_running(process.pid) for process in run.processes)
    assert "No step" not in run.log(0)


def test_one_process_watches_nobody(tmp_path):
    with Watchdog(SimpleNamespace(process_index=0, num_processes=1), tmp_path) as watchdog:
        watchdog.progress(1)
        assert watchdog._thread is None


def test_a_process_that_waits_for_its_parent_does_not_run():
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert is_running(os.getpid())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, but nobody has asked
    assert not is_running(child.pid)
    child.wait()
    assert not is_running(child.pid)
