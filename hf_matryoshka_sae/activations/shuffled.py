"""Batches of rows in random order, in bounded memory: the base of all streams of hidden states.

Rows of several names (hookpoints, and targets where these differ) stay aligned: row i of each belongs to one token.
Memory is allocated once. New rows are written into the slots of rows already drawn, and a new permutation then mixes
them with those still waiting.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.ahead import ReadAhead


# So many reads in a row without a finite row mean that the model or the hookpoint is at fault, not some text.
_PATIENCE = 8


class ShuffleBuffer:
    """Rows that wait to be drawn in random order.

    Args:
        capacity_tokens (`int`): most rows, in each tensor.
        seed (`int`): seed of the order in which rows are drawn.
    """

    def __init__(self, capacity_tokens: int, seed: int) -> None:
        self.capacity = capacity_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._storage: dict[str, Tensor] = {}
        self._waiting = torch.empty(0, dtype=torch.long)  # slots of rows not yet drawn, in the order of drawing
        self._free = torch.arange(capacity_tokens)
        self._drawn = 0  # rows of `_waiting` already drawn; their slots are free once the next rows arrive
        self._shuffled = True

    def __len__(self) -> int:
        return len(self._waiting) - self._drawn

    @property
    def room(self) -> int:
        """Return how many rows can be added."""
        return self.capacity - len(self)

    def add(self, rows: dict[str, Tensor]) -> None:
        """Add rows, `[n, D]` for each name, all with the same n.

        Raises:
            `ValueError`: there is no room for them, or the names or lengths differ.
        """
        lengths = {len(values) for values in rows.values()}
        if len(lengths) != 1 or (self._storage and rows.keys() != self._storage.keys()):
            raise ValueError(
                f"Rows must have one length and the names {list(self._storage) or list(rows)}; got lengths"
                f" {sorted(lengths)} for {list(rows)}."
            )
        num_rows = lengths.pop()
        if num_rows > self.room:
            raise ValueError(f"{num_rows} rows do not fit: the buffer holds {len(self)} of at most {self.capacity}.")
        if not self._storage:
            self._storage = {name: values.new_empty(self.capacity, values.shape[1]) for name, values in rows.items()}
        self._release()
        slots, self._free = self._free[:num_rows], self._free[num_rows:]
        for name, values in rows.items():
            self._storage[name].index_copy_(0, slots.to(values.device), values)
        self._waiting = torch.cat([self._waiting, slots])
        self._shuffled = False

    def draw(self, count: int) -> dict[str, Tensor]:
        """Take `count` random rows, fewer when fewer are left."""
        rows = next(self.peek(count, count))
        self._drawn += min(count, len(self))
        return rows

    def peek(self, count: int, chunk_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the next `count` rows in chunks, in the order in which `draw` will give them, without taking them."""
        self._shuffle()
        for slots in self._waiting[self._drawn : self._drawn + count].split(chunk_size):
            yield {name: values.index_select(0, slots.to(values.device)) for name, values in self._storage.items()}

    def _release(self) -> None:
        self._free = torch.cat([self._free, self._waiting[: self._drawn]])
        self._waiting, self._drawn = self._waiting[self._drawn :], 0

    def _shuffle(self) -> None:
        if not self._shuffled:
            self._release()
            self._waiting = self._waiting[torch.randperm(len(self._waiting), generator=self._generator)]
            self._shuffled = True

    def state_dict(self) -> dict[str, Any]:
        """Return the waiting rows in drawing order, and the generator; in which slots they lie does not matter."""
        slots = self._waiting[self._drawn :]
        rows = {name: values.index_select(0, slots.to(values.device)) for name, values in self._storage.items()}
        return {"rows": rows, "generator": self._generator.get_state(), "shuffled": self._shuffled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: the same rows come in the same order.

        Raises:
            `ValueError`: the saved rows do not fit.
        """
        fresh = ShuffleBuffer(self.capacity, 0)
        if state["rows"]:
            fresh.add(state["rows"])
        fresh._generator.set_state(state["generator"])
        fresh._shuffled = state["shuffled"]
        self.__dict__.update(fresh.__dict__)


class ShuffledStream(ABC):
    """Batches drawn from a shuffle buffer, which `_read` refills; the base of live and cached activations.

    Args:
        hookpoints (`list[str]`): hookpoints whose rows are given.
        batch_size (`int`): rows in a batch, in this process.
        buffer_tokens (`int`): rows the shuffle buffer holds, per hookpoint. It is refilled when half empty.
        rows_per_read (`int`): rows that `_read` returns at most.
        seed (`int`): seed of the shuffle.

    Attributes:
        tokens_seen (`int`): rows given out by this process.
        num_not_finite (`int`): rows left out because one of theirs is NaN or infinite.

    Raises:
        `ValueError`: the buffer cannot hold a batch beside what is read at once; while reading, the rows of many reads
            in a row are not finite.
    """

    _reads, _remedy = "reads", "Choose other hidden states."  # for messages

    def __init__(
        self, hookpoints: Sequence[str], batch_size: int, buffer_tokens: int, rows_per_read: int, seed: int
    ) -> None:
        if buffer_tokens < batch_size + rows_per_read:
            raise ValueError(
                f"`buffer_tokens` must be at least batch_size + tokens read at once = {batch_size} + {rows_per_read},"
                f" got {buffer_tokens}. Several times as much shuffles well."
            )
        self.hookpoints, self.batch_size, self.buffer_tokens = list(hookpoints), batch_size, buffer_tokens
        self.rows_per_read = rows_per_read
        self._buffer = ShuffleBuffer(buffer_tokens, seed)
        self._ahead: deque[dict[str, Tensor]] = deque()  # read, but not yet in the buffer; see `read_ahead`
        self.reader: ReadAhead[dict[str, Tensor]] | None = None
        self._exhausted = False
        self.tokens_seen = self.num_not_finite = 0
        self._reads_without_rows = 0

    @abstractmethod
    def _read(self) -> dict[str, Tensor] | None:
        """Return the next rows in reading order, on their final device and in their final type; `None` at the end."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.reader is not None and not self._exhausted:
            self.reader.start()
        if len(self._buffer) < max(self.buffer_tokens // 2, self.batch_size):
            self.fill()
        if len(self._buffer) == 0:
            raise StopIteration
        rows = self._buffer.draw(self.batch_size)
        self.tokens_seen += len(rows[self.hookpoints[0]])
        return rows

    def fill(self, advance: Callable[[int], Any] = lambda _rows: None) -> None:
        """Read until the buffer is full or the rows end.

        Args:
            advance (`Callable`, *optional*): called with the number of rows that each read added.

        Raises:
            `ValueError`: no row of many reads can be used.
        """
        while not self._exhausted and self._buffer.room >= self.rows_per_read:
            rows = self._next_rows()
            if rows is None:
                self._exhausted = True
            else:
                rows = self._usable(rows)
                self._buffer.add(rows)
                advance(len(rows[self.hookpoints[0]]))

    def _usable(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the finite rows of a read, which go into the buffer; the others are counted.

        This runs when the buffer is filled and not when rows are read, so that counts do not depend on how far ahead a
        thread has come.
        """
        finite = torch.stack([values.isfinite().all(1) for values in rows.values()]).all(0)
        kept = None if finite.all() else finite.nonzero()[:, 0]
        num_kept = len(finite) if kept is None else len(kept)
        self.num_not_finite += len(finite) - num_kept
        self._reads_without_rows = 0 if num_kept else self._reads_without_rows + 1
        if self._reads_without_rows >= _PATIENCE and self.num_not_finite:
            raise ValueError(
                f"No hidden state of {_PATIENCE} {self._reads} in a row is finite at {', '.join(self.hookpoints)}: "
                f"all hold NaN or infinity. {self._remedy}"
            )
        if kept is None:
            return rows
        return {name: values.index_select(0, kept) for name, values in rows.items()}

    def _next_rows(self) -> dict[str, Tensor] | None:
        if self.reader is not None:
            return self.reader.take()
        return self._ahead.popleft() if self._ahead else self._read()

    def read_ahead(self) -> None:
        """Read in a thread from the next batch on; see [`PrefetchedStream`], which also ends it."""
        # A filling takes half the buffer: with as much at hand it never waits for a model that is fast enough.
        self.reader = ReadAhead(
            self._read,
            self.buffer_tokens // 2,
            size=lambda rows: len(next(iter(rows.values()))),
            waiting=self._ahead,
            device=self._read_device(),
            name="activation-reader",
        )

    def peek(
        self, count: int, chunk_size: int = 8192, advance: Callable[[int], Any] = lambda _rows: None
    ) -> Iterator[dict[str, Tensor]]:
        """Return the next rows, at most `count` and at most what the buffer holds, in chunks, without using them up.

        The next batches hold these rows, unless the buffer is refilled and mixed anew before it comes to them.
        `advance` is called with the number of rows that are read for it, see [`fill`].
        """
        if len(self._buffer) < min(count, max(self.buffer_tokens // 2, self.batch_size)):
            self.fill(advance)
        return self._buffer.peek(count, chunk_size)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue: waiting rows, generator, counters; tensors and JSON-able values."""
        self.close()
        return {
            "buffer": self._buffer.state_dict(),
            "ahead": list(self._ahead),
            "exhausted": self._exhausted,
            "tokens_seen": self.tokens_seen,
            "num_not_finite": self.num_not_finite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, given the same data and options."""
        self._forget_ahead()
        self._buffer.load_state_dict({**state["buffer"], "rows": self._placed(state["buffer"]["rows"])})
        self._ahead.extend(self._placed(rows) for rows in state.get("ahead", []))
        self._exhausted, self.tokens_seen = state["exhausted"], state["tokens_seen"]
        self.num_not_finite = state.get("num_not_finite", 0)

    def close(self) -> None:
        """End the thread of `read_ahead`, at the latest after its forward pass; the next batch starts another."""
        if self.reader is not None:
            self.reader.stop()

    def _forget_ahead(self) -> None:
        if self.reader is not None:
            self.reader.reset()
        self._ahead.clear()

    def _placed(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values.to(self._row_device()) for name, values in rows.items()}

    @abstractmethod
    def _row_device(self) -> torch.device | str:
        """Return the device of the rows."""

    def _read_device(self) -> torch.device | str:
        """Return the device on which `_read` works."""
        return self._row_device()
