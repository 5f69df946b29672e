"""In which order the rows of a cache are read: a pure function of a seed and a position; resuming is seeking.

Shards are permuted in each epoch and taken several at once. What a reader has of them is cut into windows of
contiguous rows; windows of all these shards are permuted together, a number of them make a block, and the rows of a
block are permuted. Rows of a shard were mixed over a whole shuffle buffer when they were written, so each window is a
sample of many texts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


SHARDS_AT_ONCE = 8
WINDOWS_IN_BLOCK = 16


@dataclass
class Block:
    """Rows that are mixed with each other.

    Args:
        epoch (`int`): pass over the cache.
        windows (`list[list[int]]`): shard, first row, row after the last.
        order (`np.ndarray`): numbers of the block's rows, window after window, in the order in which they are given.
        next_shards (`list[int]`): which will be taken together after those of this block.
    """

    epoch: int
    windows: list[list[int]]
    order: np.ndarray
    next_shards: list[int]

    @property
    def shards(self) -> list[int]:
        """Those of the windows."""
        return sorted({shard for shard, _, _ in self.windows})


class ReadingOrder:
    """The endless order in which one of `world_size` readers gets its share of the rows, each once in an epoch.

    Args:
        shard_rows (`list[int]`): rows of each shard.
        window_rows (`int`): rows of a window.
        seed (`int`): of the permutations.
        rank, world_size (`int`): which share of the rows; all together have each row once.

    Attributes:
        rows_per_epoch (`int`): in this share.
    """

    def __init__(self, shard_rows: Sequence[int], window_rows: int, seed: int, rank: int, world_size: int):
        self._window_rows, self._seed, self._rank = window_rows, seed % 2**63, rank
        # Turns, so that no reader has the smaller part of every shard.
        parts = [(rows, (rank + shard) % world_size) for shard, rows in enumerate(shard_rows)]
        self.shares = [(part * rows // world_size, (part + 1) * rows // world_size) for rows, part in parts]
        self.rows_per_epoch = sum(self._rows(shard) for shard in range(len(self.shares)))

    def _rows(self, shard: int) -> int:
        first, end = self.shares[shard]
        return end - first

    def blocks(self, position: int) -> Iterator[Block]:
        """Blocks from the row on that is number `position` of this reader, counted through all epochs."""
        epoch, skipped = divmod(position, self.rows_per_epoch)
        while True:
            groups = self._groups(epoch)
            for number, shards in enumerate(groups):
                rows = sum(map(self._rows, shards))
                if skipped >= rows:
                    skipped -= rows
                    continue
                following = groups[number + 1] if number + 1 < len(groups) else self._groups(epoch + 1)[0]
                generator = np.random.default_rng((self._seed, epoch, number, self._rank))
                for windows, order in self._mixed(shards, generator):
                    taken = min(skipped, len(order))
                    skipped -= taken
                    if taken < len(order):
                        yield Block(epoch, windows, order[taken:], following)
            epoch += 1

    def _groups(self, epoch: int) -> list[list[int]]:
        """Shards that are taken together, equal for all readers."""
        shards = np.random.default_rng((self._seed, epoch)).permutation(len(self.shares))
        return [group.tolist() for group in np.array_split(shards, -(-len(shards) // SHARDS_AT_ONCE))]

    def _mixed(
        self, shards: list[int], generator: np.random.Generator
    ) -> Iterator[tuple[list[list[int]], np.ndarray]]:
        windows = generator.permutation(np.concatenate([self._windows(shard) for shard in shards]))
        # One permutation for all blocks: which windows are in a block, and where, is random already.
        order = generator.permutation(self._window_rows * WINDOWS_IN_BLOCK)
        for part in np.array_split(windows, -(-len(windows) // WINDOWS_IN_BLOCK)):
            rows = int((part[:, 2] - part[:, 1]).sum())
            yield part.tolist(), order if rows == len(order) else order[order < rows]

    def _windows(self, shard: int) -> np.ndarray:
        first, end = self.shares[shard]
        starts = np.arange(first, end, self._window_rows)
        return np.stack([np.full_like(starts, shard), starts, np.minimum(starts + self._window_rows, end)], 1)
