"""Who runs a language model when: one visitor at a time in each of a few lanes, first come, first served.

Work of a kind shares a lane, so that a text of a sentence never waits for a curve that takes a minute. They run beside
other lanes, on one model if need be: hooks are seen by the thread alone that set them.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


LANES = ("text", "generation", "search", "measure", "index")
"""Reading a text; continuing one; looking for a pattern; figures on held-out text; building an index."""

MOST_WAITING = 32
_LOOK_AGAIN = 0.5  # seconds after which one who waits asks whether it is still wanted


class NoLongerWantedError(ValueError):
    """The visitor who asked has gone, or asked for something else."""

    def __init__(self) -> None:
        super().__init__("This was no longer wanted.")


class Lane:
    """A lock that is given in the order in which it was asked for, and that not too many wait for.

    The thread that holds it may take it again.

    Args:
        name (`str`): What runs in it.
        most (`int`, *optional*, defaults to 32): Visitors who may wait.
    """

    def __init__(self, name: str, most: int = MOST_WAITING) -> None:
        self.name, self.most = name, most
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._owner: int | None = None

    @contextmanager
    def turn(self, wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Hold the lane for the length of the block.

        Args:
            wanted (`Callable`, *optional*): Asked while waiting.

        Raises:
            `ValueError`: if too many wait already.
            [`NoLongerWantedError`]: if it is not wanted any more when its turn comes, or before.
        """
        if self._owner == threading.get_ident():
            yield
            return
        self._enter(wanted)
        try:
            yield
        finally:
            with self._changed:
                self._owner = None
                self._changed.notify_all()

    def _enter(self, wanted: Callable[[], bool]) -> None:
        ticket = object()
        with self._changed:
            if (self._owner is not None or self._waiting) and len(self._waiting) >= self.most:
                raise ValueError(f"{self.most} others wait for this already. Try again in a minute.")
            self._waiting.append(ticket)
            try:
                while self._owner is not None or self._waiting[0] is not ticket:
                    self._changed.wait(_LOOK_AGAIN)
                    if not wanted():
                        raise NoLongerWantedError
                if not wanted():
                    raise NoLongerWantedError
                self._owner = threading.get_ident()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()


class Keyed:
    """Locks by name, each there as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[object, tuple[threading.RLock, int]] = {}

    @contextmanager
    def held(self, key: object) -> Iterator[None]:
        """Hold the lock of a name for the length of the block."""
        with self._guard:
            lock, users = self._locks.get(key, (threading.RLock(), 0))
            self._locks[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[key]
                if users > 1:
                    self._locks[key] = lock, users - 1
                else:
                    del self._locks[key]


class Remembered:
    """What is known for some seconds.

    Args:
        seconds (`float`): How long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._value: str | None = None
        self._until = 0.0

    def set(self, value: str) -> None:
        """Remember this from now on."""
        self._value, self._until = value, time.monotonic() + self.seconds

    def get(self) -> str | None:
        """What is remembered, `None` when the time is over."""
        return self._value if time.monotonic() < self._until else None
