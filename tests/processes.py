"""Processes for tests of what several do together, forked from one that has imported everything."""

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState


FORKS = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    FORKS.set_forkserver_preload(["pytest", "hf_matryoshka_sae.training", "hf_matryoshka_sae.hub", __name__])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, size: int, port: int) -> None:
    """Make this process one of several, as a launcher would have it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")


def peak_memory() -> int:
    """The most bytes that this process has held so far, on any system."""
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_accelerator() -> None:
    """The next `Accelerator` of this process sees the processes anew."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Processes:
    """Processes in one gloo group, as a launcher would start them. Made at the first call; anew after one that failed.

    Args:
        size (`int`): how many.
    """

    def __init__(self, size: int):
        self.size = size
        self._workers, self._pipes, self._folder = [], [], None

    def run(self, function: Callable, *arguments: Any, seconds: float = 120) -> list[Any]:
        """What `function(rank, *arguments)` of a module returns in each process.

        Raises:
            AssertionError: where it raised, with the traceback, or where the processes took longer than `seconds`.
        """
        if not self._workers:
            self._start()
        for pipe in self._pipes:  # `send` would leave tensors in memory that ends with this process
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results, waiting = {}, list(self._pipes)
        while waiting:
            ready = wait(waiting, seconds)
            failure = None if ready else f"the processes took longer than {seconds} s"
            for pipe in ready:
                waiting.remove(pipe)
                try:
                    error, results[pipe] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    error = "a process ended"
                failure = failure or error
            if failure:
                self.close()  # the others may wait for this one for ever
                raise AssertionError(failure)
        return [results[pipe] for pipe in self._pipes]

    def _start(self) -> None:
        self._folder, port = tempfile.TemporaryDirectory(), free_port()
        for rank in range(self.size):
            ours, theirs = FORKS.Pipe()
            arguments = (rank, self.size, port, self._folder.name, theirs)
            worker = FORKS.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._workers, self._pipes, self._folder = [], [], None


def _work(rank: int, size: int, port: int, folder: str, pipe: Connection) -> None:
    _enter(rank, size, port)
    number = 0
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        number += 1
        error = result = None
        try:
            function, arguments = pickle.loads(message)
            if not dist.is_initialized():  # at first, and after a run, which leaves its group at its end
                store = f"file://{folder}/store-{number}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            forget_accelerator()
            torch.manual_seed(0)
            result = function(rank, *arguments)
        except BaseException:
            error = traceback.format_exc()
        pipe.send_bytes(pickle.dumps((error, result)))


class Launch:
    """The processes of a training run, without a launcher that would end the others when one dies.

    Args:
        folder (`Path`): where the configuration, `run/` and `log-<rank>` go.
        size (`int`): how many.
        fields: of the run.
    """

    def __init__(self, folder: Path, size: int, **fields: Any):
        folder.mkdir(exist_ok=True)
        self.run, self.logs = folder / "run", [folder / f"log-{rank}" for rank in range(size)]
        path, port = folder / "config.yaml", free_port()
        path.write_text(yaml.safe_dump({**fields, "output_dir": str(self.run)}))
        self.all = [
            FORKS.Process(target=_train, args=(rank, size, port, path, log)) for rank, log in enumerate(self.logs)
        ]
        for process in self.all:
            process.start()

    def statuses(self, seconds: float = 200) -> list[int]:
        """How they ended, within `seconds`."""
        until = time.monotonic() + seconds
        for process in self.all:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.all]

    def finish(self) -> Path:
        """The run's folder, after all have ended well."""
        assert self.statuses() == [0] * len(self.all), self.logs[0].read_text()[-3000:]
        return self.run

    def wait_for_step(self, step: int) -> None:
        """Wait until so many steps are logged."""
        metrics = self.run / "metrics.jsonl"
        while not metrics.exists() or sum(1 for _ in metrics.open()) < step:
            assert self.all[0].is_alive(), self.logs[0].read_text()[-3000:]
            time.sleep(0.05)


def _train(rank: int, size: int, port: int, path: Path, log: Path) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    _enter(rank, size, port)
    from hf_matryoshka_sae.train import main

    sys.exit(main(["--config", str(path)]))
