"""Shuffled batches from a cache: runs of rows are copied from the memory map straight to their places in a batch.

Each row is copied once, into memory that was in use a batch ago; what is next is being read from the disk meanwhile.
Nothing else is kept: which row comes when follows from the seed and the number of rows given out.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..shuffled import ShuffledStream
from ..stream import to_device
from .fingerprint import differing_fields
from .format import BITS, STORED_DTYPES, CacheIndex, decode, read_index
from .order import Block, ReadingOrder
from .shards import MappedShard, Shards
from .storage import CacheStorage


logger = logging.getLogger(__name__)

_RUN_BYTES = 2**17  # of the widest hookpoint: long enough to be copied nearly as fast as rows in order
_RUNS_IN_BATCH = 16  # at least, however small the batch
_WINDOW_BYTES = 2**18  # long enough for a disk to read in one go
_BLOCKS_AHEAD = 4  # which the operating system is asked to read before they are needed


class CachedActivationStream(ShuffledStream):
    """Batches from a cache, endless, with the interface of [`ActivationStream`].

    In each epoch shards are taken in another order, several at a time; windows of contiguous rows of all of them are
    drawn at random, and 32 windows at a time are mixed in runs of 128 kB (85 rows of width 768 in bfloat16), shorter
    for small batches. Readers have disjoint shares of the rows, which together are all of them. Local shards
    are memory-mapped. Of others the share is fetched by byte ranges to the local disk's temporary files, at most 16
    shards' at a time.

    Args:
        place (`str` or `Path`): the cache, a folder, or a URL that fsspec knows (`s3://`, `hf://datasets/...`).
        fingerprint (`dict`): what this run would harvest, as [`cache_fingerprint`] gives it.
        hookpoints (`list[str]`): which of the cached hookpoints to read.
        batch_size (`int`): rows in a batch, in this process.
        buffer_tokens (`int`): rows that `peek` shows at most; a [`PrefetchedStream`] reads half as many ahead. Without
            one no more than a batch is in memory, per hookpoint, whatever the size of the cache.
        device (`torch.device`, *optional*, defaults to `"cpu"`): device of the rows.
        dtype (`torch.dtype`, *optional*): type of the rows; by default as they are stored, float32 for int8.
        seed (`int`, *optional*, defaults to `0`): seed of the order of rows and shards.
        rank (`int`, *optional*, defaults to 0): number of this reader.
        world_size (`int`, *optional*, defaults to 1): number of readers; may differ from that of the writers.
        stored_as (`str`, *optional*): refuse a cache whose rows are stored otherwise, for example other than `bf16`.

    Attributes:
        tokens_seen (`int`): rows given out by this process.
        num_cached (`int`): rows in the cache, for all readers together.
        index ([`CacheIndex`]): the index of the cache.

    Raises:
        `ValueError`: the cache is half-written, damaged or was made with something else (the message names the
            fields), or the buffer is too small.
    """

    def __init__(
        self,
        place: str | Path,
        fingerprint: dict[str, Any],
        hookpoints: Sequence[str],
        batch_size: int,
        buffer_tokens: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        stored_as: str | None = None,
    ) -> None:
        super().__init__(hookpoints, batch_size, buffer_tokens, batch_size, seed)
        storage = CacheStorage(place)
        self.index = checked_index(storage, fingerprint, stored_as)
        self.num_cached = self.index.rows
        if self.num_cached < world_size * batch_size:
            raise ValueError(
                f"The activation cache has {self.num_cached} rows, fewer than one batch of {batch_size} for each of"
                f" {world_size} processes. Build a larger one."
            )
        stored = torch.float32 if self.index.dtype == "int8" else STORED_DTYPES[self.index.dtype]
        self._device, self._dtype = device, dtype or stored
        row_bytes = max(self.index.widths[name] for name in hookpoints) * self._dtype.itemsize
        run_rows = max(1, min(_RUN_BYTES // row_bytes, batch_size // _RUNS_IN_BATCH))
        window_rows = run_rows * max(1, _WINDOW_BYTES // row_bytes // run_rows)
        shard_rows = [shard.rows for shard in self.index.shards.values()]
        self._order = ReadingOrder(shard_rows, run_rows, window_rows, seed, rank, world_size)
        self._shards = Shards(storage, self.index, self.hookpoints, self._order.shares)
        widths = {name: self.index.widths[name] for name in hookpoints}
        # It knows nothing of this stream, so that a forgotten one is collected at once, with its maps and files.
        self._reader_at = partial(_Reader, self._shards, self._order, self.index.dtype, widths, self._dtype)
        self._buffer = _Waiting(batch_size, buffer_tokens, self._reader_at, device)
        self._warned = False
        self._seek(0)

    def _seek(self, position: int) -> None:
        self._position, self._reader = position, self._reader_at(position)

    def _read(self) -> dict[str, Tensor]:
        try:
            rows = self._reader.take(self.batch_size)
        except OSError:  # of a store elsewhere: whoever tries again gets the same rows
            self._seek(self._position)
            raise
        self._position += self.batch_size
        if self._reader.epoch and not self._warned:
            logger.warning("All %d cached rows have been read once; reading them again.", self.num_cached)
            self._warned = True
        return _on(self._device, rows)

    def _usable(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return rows  # what is not finite was left out when the cache was built

    def _row_device(self) -> torch.device | str:
        return self._device

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue: how many rows have been given out."""
        self.close()
        return {"tokens_seen": self.tokens_seen, "exhausted": False}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, given the same cache and options."""
        self._forget_ahead()
        self.tokens_seen = state["tokens_seen"]
        self._buffer.restart(self.tokens_seen)
        self._seek(self.tokens_seen)


def checked_index(storage: CacheStorage, fingerprint: dict[str, Any], stored_as: str | None) -> CacheIndex:
    """Return the index of a cache, after checking that it is complete, undamaged and made of what a run would harvest.

    Args:
        storage ([`CacheStorage`]): the files of the cache.
        fingerprint (`dict`): what the run would harvest, as [`cache_fingerprint`] gives it.
        stored_as (`str`, *optional*): how its rows must be stored, one of `STORED_DTYPES`.

    Raises:
        `ValueError`: the cache is half-written, damaged or differs; the message names the file or the fields.
    """
    index = read_index(storage)
    differing = differing_fields(fingerprint, index.fingerprint)
    if stored_as not in (None, index.dtype):
        differing.append(f"dtype is {index.dtype} there, {stored_as} here")
    if differing:
        raise ValueError(
            f"The activation cache '{storage}' was made with something else: {'; '.join(differing)}. Give this run"
            " another folder, or delete the cache."
        )
    # A store elsewhere would be asked for each of its files; there what was fetched is counted instead.
    damaged = index.damaged(storage) if storage.folder is not None else None
    if damaged is not None:
        raise ValueError(f"The activation cache '{storage}' is damaged at '{damaged}'. Delete it and build it anew.")
    return index


class _Reader:
    """Reads rows from a position on, block by block."""

    def __init__(
        self,
        shards: Shards,
        order: ReadingOrder,
        stored: str,
        widths: dict[str, int],
        dtype: torch.dtype,
        position: int,
    ) -> None:
        self._shards, self._stored, self._widths, self._dtype = shards, stored, widths, dtype
        self._blocks = order.blocks(position)
        self._ahead: deque[Block] = deque()
        self._announced: list[int] | None = None
        self._runs: deque[list[int]] = deque()  # of the block that is being read
        self._mapped: dict[int, MappedShard] = {}  # its shards, by number
        self.epoch = 0

    def take(self, count: int) -> dict[str, Tensor]:
        """Return the next `count` rows, `[count, D]` for each hookpoint, on the CPU."""
        batch = {name: self._empty(count, width) for name, width in self._widths.items()}
        filled = 0
        while filled < count:
            if not self._runs:
                self._open(self._next_block())
            number, first, end = self._runs.popleft()
            num_rows = min(end - first, count - filled)
            if num_rows < end - first:
                self._runs.appendleft([number, first + num_rows, end])
            shard = self._mapped[number]
            start = first - shard.first_row
            for name, rows in batch.items():
                part = rows[filled : filled + num_rows]
                decode(shard.arrays, name, start, start + num_rows, self._stored, part, self._dtype)
            filled += num_rows
        return {name: torch.from_numpy(rows).view(self._dtype) for name, rows in batch.items()}

    def _empty(self, rows: int, width: int) -> np.ndarray:
        bits = torch.empty(0, dtype=BITS[self._dtype]).numpy().dtype
        return np.empty((rows, width), bits)  # numpy asks for huge pages where there is much of it

    def _open(self, block: Block) -> None:
        self._mapped = {shard: self._shards.get(shard) for shard in block.shards}
        self.epoch, self._runs = block.epoch, deque(block.runs)

    def _next_block(self) -> Block:
        while len(self._ahead) < _BLOCKS_AHEAD:
            block = next(self._blocks)
            if not self._ahead:  # at the start; later ones were announced as those that come next
                self._shards.announce(block.shards)
            self._ahead.append(block)
            self._shards.will_need(block)
        block = self._ahead.popleft()
        if block.next_shards is not self._announced:
            self._announced = block.next_shards
            self._shards.announce(block.next_shards)
        return block


def _on(device: torch.device | str, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: to_device(values, device) for name, values in rows.items()}


class _Waiting:
    """The next batch, with the interface of a [`ShuffleBuffer`]. It is mixed already, so that no more need to wait.

    Args:
        capacity (`int`): rows held at most: those of a batch.
        seen (`int`): rows that `peek` shows at most.
        reader_at (`Callable`): returns a [`_Reader`] at a position.
        device (`torch.device`): device of the rows.
    """

    def __init__(
        self, capacity: int, seen: int, reader_at: Callable[[int], _Reader], device: torch.device | str
    ) -> None:
        self._capacity, self._seen, self._reader_at, self._device = capacity, seen, reader_at, device
        self.restart(0)

    def restart(self, position: int) -> None:
        """Forget the batches; `position` rows have been drawn."""
        self._batches: deque[dict[str, Tensor]] = deque()
        self._position = position

    def __len__(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self._batches)

    @property
    def room(self) -> int:
        return self._capacity - len(self)

    def add(self, rows: dict[str, Tensor]) -> None:
        self._batches.append(rows)

    def draw(self, count: int) -> dict[str, Tensor]:  # noqa: ARG002  a batch is drawn whole
        rows = self._batches.popleft()
        self._position += len(next(iter(rows.values())))
        return rows

    def peek(self, count: int, chunk_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the rows that will be drawn, from a reader of their own."""
        reader, left = self._reader_at(self._position), min(count, self._seen)
        while left > 0:
            yield _on(self._device, reader.take(min(chunk_size, left)))
            left -= chunk_size
