"""In which order the rows of a cache are read: a pure function of a seed and a position; resuming is seeking.

Shards are permuted in each epoch and taken several at once. What a reader has of them is cut into windows of
contiguous rows, elsewhere in each epoch; windows of all these shards are permuted together, a number of them make a
block, and the runs of which they consist, a few rows each, are permuted. A run stays together: the order of rows in a
batch means nothing to training, and copying row by row would halve the speed. Rows of a shard were mixed over a whole
shuffle buffer when they were written, so that neighbours in a run come from different texts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


SHARDS_AT_ONCE = 8
WINDOWS_IN_BLOCK = 32


@dataclass
class Block:
    """Runs of rows that are mixed with each other.

    Args:
        epoch (`int`): pass over the cache.
        windows (`list[list[int]]`): shard, first row and row after the last, of each window.
        runs (`list[list[int]]`): pieces of the windows in reading order, described like them.
        next_shards (`list[int]`): the shards that are read together after those of this block.
    """

    epoch: int
    windows: list[list[int]]
    runs: list[list[int]]
    next_shards: list[int]

    @property
    def shards(self) -> list[int]:
        """Return the shards that the windows lie in, ascending."""
        return sorted({shard for shard, _, _ in self.windows})


class ReadingOrder:
    """The endless order in which one of `world_size` readers gets its share of the rows, each once in an epoch.

    Args:
        shard_rows (`list[int]`): rows of each shard.
        run_rows (`int`): rows of a run, which stay together.
        window_rows (`int`): rows of a window, a multiple of `run_rows`.
        seed (`int`): seed of the permutations.
        rank (`int`): number of this reader; its share and those of the others have each row once.
        world_size (`int`): number of readers.

    Attributes:
        rows_per_epoch (`int`): rows in this reader's share.
    """

    def __init__(
        self, shard_rows: Sequence[int], run_rows: int, window_rows: int, seed: int, rank: int, world_size: int
    ) -> None:
        self._run_rows, self._window_rows, self._seed, self._rank = run_rows, window_rows, seed % 2**63, rank
        # Turns, so that no reader has the smaller part of every shard.
        parts = [(rows, (rank + shard) % world_size) for shard, rows in enumerate(shard_rows)]
        self.shares = [(part * rows // world_size, (part + 1) * rows // world_size) for rows, part in parts]
        self.rows_per_epoch = sum(self._rows(shard) for shard in range(len(self.shares)))

    def _rows(self, shard: int) -> int:
        first, end = self.shares[shard]
        return end - first

    def blocks(self, position: int) -> Iterator[Block]:
        """Yield the blocks from this reader's row number `position` on, counted through all epochs."""
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
                for windows, runs in self._mixed(shards, generator):
                    ends = np.cumsum(runs[:, 2] - runs[:, 1])
                    left = runs[np.searchsorted(ends, skipped, side="right") :]
                    if len(left):
                        left[0, 1] = left[0, 2] - (ends[-len(left)] - skipped)
                        yield Block(epoch, windows.tolist(), left.tolist(), following)
                    skipped = max(0, skipped - int(ends[-1]))
            epoch += 1

    def _groups(self, epoch: int) -> list[list[int]]:
        """Return the groups of shards that are read together in an epoch, equal for all readers."""
        shards = np.random.default_rng((self._seed, epoch)).permutation(len(self.shares))
        return [group.tolist() for group in np.array_split(shards, -(-len(shards) // SHARDS_AT_ONCE))]

    def _mixed(self, shards: list[int], generator: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        phases = generator.integers(self._window_rows, size=len(shards))
        windows = np.concatenate([self._windows(*shard) for shard in zip(shards, phases, strict=True)])
        windows = generator.permutation(windows)
        for part in np.array_split(windows, -(-len(windows) // WINDOWS_IN_BLOCK)):
            yield part, generator.permutation(self._cut(part))

    def _windows(self, shard: int, phase: int) -> np.ndarray:
        first, end = self.shares[shard]
        cuts = np.unique(np.r_[first, np.arange(first + phase, end, self._window_rows), end])
        return np.stack([np.full(len(cuts) - 1, shard), cuts[:-1], cuts[1:]], 1)

    def _cut(self, windows: np.ndarray) -> np.ndarray:
        """Return the runs of which windows consist, rows of (shard, first, end)."""
        starts = windows[:, 1:2] + np.arange(0, self._window_rows, self._run_rows)
        ends = np.minimum(starts + self._run_rows, windows[:, 2:])
        runs = np.stack([np.broadcast_to(windows[:, :1], starts.shape), starts, ends], 2)
        return runs[starts < ends]
