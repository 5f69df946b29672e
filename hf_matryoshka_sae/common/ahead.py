"""Reading ahead in a thread, so that forward passes overlap with what follows."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Generic, TypeVar

import torch


T = TypeVar("T")


class ReadAhead(Generic[T]):
    """A thread that calls `read` while less than `limit` waits to be taken.

    Without the thread, before `start` and after `stop`, `take` gives what waits and then reads itself: items come in
    the same order either way. An error comes where it would have come without the thread.

    Args:
        read (`Callable`): Gives the next item; `None` at the end.
        limit (`int`): How much is read ahead, as `size` counts it.
        size (`Callable`, *optional*): Of an item; by default each counts as one.
        waiting (`deque`, *optional*): Where items wait; by default a new one.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where `read` works.
        name (`str`, *optional*, defaults to `"reader"`): Of the thread.
    """

    def __init__(
        self,
        read: Callable[[], T | None],
        limit: int,
        *,
        size: Callable[[T], int] = lambda item: 1,
        waiting: deque[T] | None = None,
        device: torch.device | str = "cpu",
        name: str = "reader",
    ):
        self._read, self._limit, self._size, self._name = read, max(1, limit), size, name
        self.waiting = deque() if waiting is None else waiting
        self._device = torch.device(device)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running = self._stopping = False
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin to read, unless it does, or has come to an end or an error since it began."""
        if self._thread is None and self.error is None:
            self._running, self._stopping = True, False
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Wait for the read at hand and end the thread; what it read stays."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        # Garbage is collected in whichever thread is running, this one too.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None

    def reset(self) -> None:
        """End the thread, and forget an error that nobody has come to yet."""
        self.stop()
        self.error = None

    def take(self) -> T | None:
        """The next item: one that waits, or else the thread's next; without a thread it is read here."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or not self._running)
            if self.waiting:
                item = self.waiting.popleft()
                self._changed.notify_all()
                return item
            error, self.error = self.error, None
        if error is not None:
            raise error
        return self._read()

    def held(self) -> int:
        """How much waits."""
        with self._changed:
            return sum(map(self._size, self.waiting))

    def _work(self) -> None:
        # Gradient mode and the current device belong to a thread. CUDA streams do too, and none is made here: all
        # threads share a device's default stream, so that kernels on rows run in the order in which they are issued
        # and memory is handed on safely. Of two devices each has its own, and torch orders copies between them.
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        error = None
        try:
            with torch.no_grad(), on_device:
                while self._has_room():
                    item = self._read()
                    if item is None:
                        break
                    with self._changed:
                        self.waiting.append(item)
                        self._changed.notify_all()
                    del item  # not held beyond its turn while waiting for room
        except BaseException as caught:  # whatever it is, the consumer waits for it
            error = caught
        with self._changed:
            self.error, self._running = error, False
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Wait until there is room to read; False when asked to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or sum(map(self._size, self.waiting)) < self._limit)
            return not self._stopping


def ahead(items: Generator[T], depth: int = 2) -> Iterator[T]:
    """The same items, up to `depth` of them made before they are asked for; errors come where they belong.

    The thread ends with the generator, at the latest after the item it is making; no item may be `None`.
    """
    reader = ReadAhead(lambda: next(items, None), depth)
    try:
        reader.start()
        while (item := reader.take()) is not None:
            yield item
    finally:
        reader.stop()
        items.close()  # what it waits for in turn ends with it


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
