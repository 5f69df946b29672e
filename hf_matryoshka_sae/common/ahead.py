"""An iterator that runs ahead in a thread of its own, so that forward passes overlap with what follows."""

import os
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch


T = TypeVar("T")

_END = object()


def ahead(items: Generator[T], depth: int = 2) -> Iterator[T]:
    """The same items, up to `depth` of them made before they are asked for; errors come where they belong.

    The thread ends with the generator, at the latest after the item it is making.
    """
    waiting: queue.Queue = queue.Queue(depth)
    stopping = threading.Event()

    def put(item) -> None:
        while not stopping.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stopping.is_set():
                    return
            put((_END, None))
        except BaseException as error:  # whatever it is, the consumer waits for it
            put((_END, error))
        finally:
            items.close()  # what it waits for in turn ends with it

    thread = threading.Thread(target=work, name="feature-index-reader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopping.set()
        thread.join()


@contextmanager
def shared_cores(device: torch.device, processes: int = 1) -> Iterator[bool]:
    """Whether to run ahead. On a CPU with no core to spare, torch's threads are halved while the block runs.

    Every Python thread that calls torch has a pool of them, and two pools on the same cores get in each other's way.

    Args:
        device (`torch.device`): Where the language model runs.
        processes (`int`, *optional*, defaults to 1): On this machine, where the launcher does not say.
    """
    threads = torch.get_num_threads()
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if device.type != "cpu" or cores >= 2 * processes * threads:
        yield True
    elif threads == 1:
        yield False
    else:
        torch.set_num_threads(threads // 2)
        try:
            yield True
        finally:
            torch.set_num_threads(threads)
