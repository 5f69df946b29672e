"""A pool of rows in bounded memory, drawn in random order without replacement.

Rows of several hookpoints stay aligned: row i of each belongs to one token. Memory is allocated once. New rows are
written into the slots of rows already drawn, and a new permutation then mixes them with those still waiting.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ShuffleBuffer:
    """Rows waiting to be drawn.

    Args:
        capacity_tokens (`int`): rows held at most, in each tensor.
        seed (`int`): seed of the order in which rows are drawn.
    """

    def __init__(self, capacity_tokens: int, seed: int):
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
        """Rows that can be added."""
        return self.capacity - len(self)

    def add(self, rows: dict[str, Tensor]) -> None:
        """Adds rows, `[n, D]` for each name, all with the same n.

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
        """Takes `count` random rows, fewer when fewer are left."""
        rows = next(self.peek(count, count))
        self._drawn += min(count, len(self))
        return rows

    def peek(self, count: int, chunk_size: int) -> Iterator[dict[str, Tensor]]:
        """The next `count` rows in chunks, in the order in which `draw` will give them, without taking them."""
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
        """Waiting rows in drawing order, and the generator; the slots they lie in do not matter."""
        slots = self._waiting[self._drawn :]
        rows = {name: values.index_select(0, slots.to(values.device)) for name, values in self._storage.items()}
        return {"rows": rows, "generator": self._generator.get_state(), "shuffled": self._shuffled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken: the same rows come in the same order.

        Raises:
            `ValueError`: the saved rows do not fit.
        """
        fresh = ShuffleBuffer(self.capacity, 0)
        if state["rows"]:
            fresh.add(state["rows"])
        fresh._generator.set_state(state["generator"])
        fresh._shuffled = state["shuffled"]
        self.__dict__.update(fresh.__dict__)
