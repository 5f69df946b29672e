"""The rows of shards as memory-mapped arrays; what lies elsewhere is fetched to the local disk first, a few at a time.

Of a shard that is not local a reader fetches the byte ranges of its own share and its own hookpoints, in pieces, to a
folder of its own among temporary files, where at most `2 * SHARDS_AT_ONCE` lie: what it reads and what comes next. A
cache of no more shards than that is fetched once.
"""

import math
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .format import CacheIndex, layout
from .order import SHARDS_AT_ONCE, WINDOWS_IN_BLOCK, Block
from .storage import CacheStorage


_PIECE = 2**24  # bytes fetched at once
_FETCHED_AT_ONCE = 4
_CAN_ASK = hasattr(mmap, "MADV_WILLNEED") and hasattr(os, "RWF_NOWAIT")  # Linux


class MappedShard:
    """Arrays of a file, as [`decode`] takes them.

    Args:
        path (`Path`): the file.
        arrays (`dict[str, tuple]`): first byte, raw type and shape of each array, by name.
        first_row (`int`, *optional*, defaults to 0): number in the shard of the row that the file begins with.
    """

    def __init__(self, path: Path, arrays: dict[str, tuple[int, type, tuple[int, ...]]], first_row: int = 0) -> None:
        self._file = path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self.path, self.first_row = path, first_row
        self._offsets = {name: offset for name, (offset, _, _) in arrays.items()}
        self.arrays = {
            name: np.frombuffer(self._map, raw, math.prod(shape), offset).reshape(shape)
            for name, (offset, raw, shape) in arrays.items()
        }

    def will_need(self, hookpoints: Sequence[str], first: int, end: int) -> None:
        """Ask the operating system to read rows of the shard from the disk, without waiting for them."""
        for name in hookpoints:
            start, stop = self._bytes(name, first), self._bytes(name, end)
            aligned = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, aligned, min(stop, len(self._map)) - aligned)

    def in_memory(self, hookpoint: str, row: int) -> bool:
        """Return whether a row is in the page cache; asking costs much less than reading it again in vain."""
        try:
            return os.preadv(self._file.fileno(), [bytearray(1)], self._bytes(hookpoint, row), os.RWF_NOWAIT) == 1
        except OSError:  # it cannot, or this file system does not say
            return False

    def _bytes(self, hookpoint: str, row: int) -> int:
        return self._offsets[hookpoint] + (row - self.first_row) * self.arrays[hookpoint].strides[0]


class Shards:
    """The shards of a cache, opened when they are asked for; safe to use from several threads.

    Args:
        storage ([`CacheStorage`]): the files of the cache.
        index ([`CacheIndex`]): the index of the cache.
        hookpoints (`list[str]`): hookpoints whose arrays are read.
        shares (`list[tuple[int, int]]`): rows of each shard that will be read: the first, and the one after the last.
    """

    def __init__(
        self,
        storage: CacheStorage,
        index: CacheIndex,
        hookpoints: Sequence[str],
        shares: Sequence[tuple[int, int]],
    ) -> None:
        self._storage, self._index, self._hookpoints, self._shares = storage, index, list(hookpoints), shares
        self._names = list(index.shards)
        self._open: OrderedDict[int, Future[MappedShard]] = OrderedDict()
        self._lock = threading.Lock()
        self._folder: Path | None = None
        if storage.folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="activation-cache-"))
            self._fetchers = ThreadPoolExecutor(_FETCHED_AT_ONCE, "activation-fetcher")
            weakref.finalize(self, _clear, self._fetchers, self._folder)

    def announce(self, shards: Sequence[int]) -> None:
        """Begin to fetch shards that will be needed."""
        with self._lock:
            for shard in shards:
                self._begin(shard)

    def get(self, shard: int) -> MappedShard:
        """Return a shard, after waiting until it is fetched.

        Raises:
            `OSError`: it cannot be read; the next call tries again.
        """
        with self._lock:
            mapped = self._begin(shard)
        return mapped.result()

    def will_need(self, block: Block) -> None:
        """Have a block's rows read from the disk, as far as its shards are open."""
        if not _CAN_ASK:
            return
        with self._lock:
            pending = {shard: self._open.get(shard) for shard in block.shards}
        done = {shard: future for shard, future in pending.items() if future is not None and future.done()}
        mapped = {shard: future.result() for shard, future in done.items() if future.exception() is None}
        windows = [(mapped[shard], first, end) for shard, first, end in block.windows if shard in mapped]
        name = self._hookpoints[0]
        if not all(shard.in_memory(name, first) for shard, first, _ in windows[:: WINDOWS_IN_BLOCK // 4]):
            for shard, first, end in windows:
                shard.will_need(self._hookpoints, first, end)

    def _begin(self, shard: int) -> "Future[MappedShard]":
        future = self._open.get(shard)
        if future is None or (future.done() and future.exception() is not None):
            if future is None and len(self._open) >= 2 * SHARDS_AT_ONCE:
                self._forget(next(iter(self._open)))
            self._open[shard] = self._future(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _future(self, shard: int) -> "Future[MappedShard]":
        if self._folder is not None:
            return self._fetchers.submit(self._fetch, shard)
        future: Future[MappedShard] = Future()
        future.set_result(self._map(shard))
        return future

    def _forget(self, shard: int) -> None:
        future = self._open.pop(shard)
        if self._folder is not None and not future.cancel():
            # A mapped file keeps its bytes after its name is gone; one that is being fetched goes when it is whole.
            future.add_done_callback(_unlink)

    def _arrays(self, rows: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        arrays: dict[str, tuple[type, tuple[int, ...]]] = {}
        for name in self._hookpoints:
            arrays |= layout(name, self._index.dtype, rows, self._index.widths[name])
        return arrays

    def _map(self, shard: int) -> MappedShard:
        entry = self._index.shards[self._names[shard]]
        placed = {name: (entry.offsets[name], *array) for name, array in self._arrays(entry.rows).items()}
        return MappedShard(self._storage.folder / self._names[shard], placed)

    def _fetch(self, shard: int) -> MappedShard:
        """Fetch the share's rows of each array to a file of its own, one array after the other."""
        first, end = self._shares[shard]
        entry = self._index.shards[self._names[shard]]
        whole, share = self._arrays(entry.rows), self._arrays(end - first)
        placed: dict[str, tuple[int, type, tuple[int, ...]]] = {}
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            for name, (raw, shape) in share.items():
                row_bytes = math.prod(shape[1:]) * np.dtype(raw).itemsize
                start = entry.offsets[name] + (first * row_bytes if shape != whole[name][1] else 0)
                size = math.prod(shape) * np.dtype(raw).itemsize
                placed[name] = file.tell(), raw, shape
                for at in range(start, start + size, _PIECE):
                    file.write(self._storage.read(self._names[shard], at, min(at + _PIECE, start + size)))
                file.write(b"\0" * (-file.tell() % 8))
        return MappedShard(Path(file.name), placed, first)


def _unlink(fetched: "Future[MappedShard]") -> None:
    if not fetched.cancelled() and fetched.exception() is None:
        fetched.result().path.unlink(missing_ok=True)


def _clear(fetchers: ThreadPoolExecutor, folder: Path) -> None:
    fetchers.shutdown(wait=False, cancel_futures=True)
    shutil.rmtree(folder, ignore_errors=True)
