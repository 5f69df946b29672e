"""Processes that stay for the session, for tests of what several do together: starting interpreters takes seconds."""

import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState


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
        context = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, port, self._folder.name, theirs)
            worker = context.Process(target=_work, args=arguments, daemon=True)
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
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
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
