"""The language model runs ahead of training, in a thread of its own.

A shuffle buffer is refilled in gulps of half its size, so a few batches drawn ahead would not bridge a gulp. What is
done ahead is therefore the reading (tokens, forward pass, move to the rows' device), up to the next gulp; filling the
buffer and drawing from it stay where they are, and so every row comes in the same order as without the thread.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .shuffled import ShuffledStream


class PrefetchedStream(ShuffledStream):
    """A stream whose next rows are read in a thread, used like the stream itself and giving the same batches.

    The thread starts with the first batch drawn; `peek` before that reads as the wrapped stream does. States of the
    two are interchangeable: rows read ahead are part of them. Taking one pauses the thread after the forward pass it
    is in. An error of the reading is raised where it would have been raised without the thread.

    Args:
        stream ([`ActivationStream`] or [`CachedActivationStream`]): what to read ahead of; it is not to be used
            itself from then on. Nor is its language model, unless `close` was called. Its attributes, such as
            `num_outliers`, are attributes of this stream too.

    Attributes:
        tokens_seen (`int`): rows given out by this process.
    """

    def __init__(self, stream: ShuffledStream):
        super().__init__(stream.hookpoints, stream.batch_size, stream.buffer_tokens, stream._rows_per_read, seed=0)
        self._stream = stream
        del self.num_not_finite  # the wrapped stream counts
        # One buffer and one queue: the wrapped stream saves and loads them.
        self._buffer, self._ahead = stream._buffer, stream._ahead
        self._exhausted, self.tokens_seen = stream._exhausted, stream.tokens_seen
        # A filling takes half the buffer: with as much at hand it never waits for a model that is fast enough.
        self._reader = _Reader(stream._read, self._ahead, self.buffer_tokens // 2, stream._read_device())
        # The thread ends with the stream, or with the process: torch must not be at work while Python shuts down.
        weakref.finalize(self, self._reader.stop)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
        return getattr(self._stream, name)

    def __next__(self) -> dict[str, Tensor]:
        if not self._exhausted:
            self._reader.start()
        return super().__next__()

    def _next_rows(self) -> dict[str, Tensor] | None:
        return self._reader.take()

    def _read(self) -> dict[str, Tensor] | None:
        return self._stream._read()

    def _usable(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._stream._usable(rows)

    def _row_device(self) -> torch.device | str:
        return self._stream._row_device()

    def close(self) -> None:
        """Ends the thread, at the latest after the forward pass it is in. The next batch drawn starts another."""
        self._reader.stop()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, with or without a thread: the wrapped stream's state."""
        self.close()
        return {**self._stream.state_dict(), "exhausted": self._exhausted, "tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` of this or of a plain stream was taken, given the same data and options."""
        self._reader.reset()
        self._stream.load_state_dict(state)
        self._exhausted, self.tokens_seen = state["exhausted"], state["tokens_seen"]


class _Reader:
    """A thread that calls `read` while fewer than `limit` rows wait in `waiting`.

    It knows nothing of the stream that owns it, so that a forgotten stream can be collected and end its thread.
    """

    def __init__(
        self,
        read: Callable[[], dict[str, Tensor] | None],
        waiting: deque[dict[str, Tensor]],
        limit: int,
        device: torch.device | str,
    ):
        self._read, self._waiting, self._limit, self._device = read, waiting, max(1, limit), torch.device(device)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running = self._stopping = False
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begins to read, unless it does, or has come to an end or an error since it began."""
        if self._thread is None and self._error is None:
            self._running, self._stopping = True, False
            self._thread = threading.Thread(target=self._work, name="activation-reader", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Waits for the read at hand and ends the thread; what it read stays."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        # Garbage is collected in whichever thread is running, this one too.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None

    def reset(self) -> None:
        """Ends the thread and forgets an error that nobody has come to yet."""
        self.stop()
        self._error = None

    def take(self) -> dict[str, Tensor] | None:
        """The next rows: those that wait, or else the thread's next; without a thread they are read here."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._running)
            if self._waiting:
                rows = self._waiting.popleft()
                self._changed.notify_all()
                return rows
            error, self._error = self._error, None
        if error is not None:
            raise error
        return self._read()

    def _work(self) -> None:
        # Gradient mode and the current device belong to a thread. CUDA streams do too, and none is made here: all
        # threads share a device's default stream, so that kernels on rows run in the order in which they are issued
        # and memory is handed on safely. Of two devices each has its own, and torch orders copies between them.
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        error = None
        try:
            with torch.no_grad(), on_device:
                while self._has_room():
                    rows = self._read()
                    if rows is None:
                        break
                    with self._changed:
                        self._waiting.append(rows)
                        self._changed.notify_all()
                    del rows  # not held beyond their turn while waiting for room
        except BaseException as caught:  # whatever it is, the consumer waits for it
            error = caught
        with self._changed:
            self._error, self._running = error, False
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Waits until there is room to read; False when asked to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._rows() < self._limit)
            return not self._stopping

    def _rows(self) -> int:
        return sum(len(next(iter(rows.values()))) for rows in self._waiting)
