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

    Without the thread, before `start` and after `stop`, `take` returns waiting items and then reads itself: items come
    in the same order either way. An error is raised where it would have been without the thread.

    Args:
        read (`Callable`): Returns the next item; `None` at the end.
        limit (`int`): Most that is read ahead, in units of `size`.
        size (`Callable`, *optional*): Returns the size of an item; by default each counts as one.
        waiting (`deque`, *optional*): Queue of items that were read but not taken; by default a new one.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Device on which `read` works.
        name (`str`, *optional*, defaults to `"reader"`): Name of the thread.
    """

    def __init__(
        self,
        read: Callable[[], T | None],
        limit: int,
        *,
        size: Callable[[T], int] = lambda _item: 1,
        waiting: deque[T] | None = None,
        device: torch.device | str = "cpu",
        name: str = "reader",
    ) -> None:
        self._read, self._limit, self._size, self._name = read, max(1, limit), size, name
        self.waiting = deque() if waiting is None else waiting
        self._device = torch.device(device)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running = self._stopping = False
        self.error: BaseException | None = None

    def start(self) -> None:
        """Start the thread, unless it runs, has come to the end or to an error that was not yet raised."""
        if self._thread is None and self.error is None:
            self._running, self._stopping = True, False
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Wait until the current read is done and end the thread; items that were read stay."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        # A finalizer may call this in the reading thread itself, which cannot join itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None

    def reset(self) -> None:
        """End the thread, and forget an error that was not yet raised."""
        self.stop()
        self.error = None

    def take(self) -> T | None:
        """Return the next item: one that waits, or else the thread's next; without a thread it is read here."""
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
        """Return the size of all waiting items together."""
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
        """Wait until there is room to read; return False when the thread is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or sum(map(self._size, self.waiting)) < self._limit)
            return not self._stopping


def ahead(items: Generator[T], depth: int = 2) -> Iterator[T]:
    """Yield the same items, up to `depth` of them computed in a thread before they are needed.

    An error of the generator is raised at its place among the items. The thread ends with this generator, at the
    latest after the item that it is computing; no item may be `None`.
    """
    reader = ReadAhead(lambda: next(items, None), depth)
    try:
        reader.start()
        while (item := reader.take()) is not None:
            yield item
    finally:
        reader.stop()
        items.close()  # ends the threads that the items themselves may be read in


@contextmanager
def shared_cores(device: torch.device, processes: int = 1) -> Iterator[bool]:
    """Yield whether to run ahead. On a CPU with no core to spare, torch's threads are halved while the block runs.

    Every Python thread that calls torch has a pool of them, and two pools on the same cores get in each other's way.

    Args:
        device (`torch.device`): Device of the language model.
        processes (`int`, *optional*, defaults to 1): Processes on this machine, where the launcher does not say.
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
