"""Hidden states on their way from the processes that read them to those that train on them.

A run has Q independent readers ("streams"), each owned by one process that runs the language model. A batch is the
rows of all streams in order; a replica of a dictionary takes its share of the streams. So a run with the same Q sees
the same batches on any number of processes, and goes on with another number where it was interrupted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...activations import RowStream
from .placement import Placement, Processes


class EndOfStates(ValueError):
    """A stream has no more rows."""


class Feed:
    """Gives a process the rows that its dictionaries need, batch by batch.

    Args:
        streams (`dict[int, RowStream]`): This process's streams by number.
        placements (`list[Placement]`): Of all dictionaries of all processes.
        shapes (`dict[str, tuple[int, torch.dtype]]`): Width and type of the rows of each hookpoint.
        processes ([`Processes`]): Of the run.
        device (`torch.device`): Where received rows go.
        ahead (`bool`): Have the next batch on its way while one is trained on; for processes that only read.
        keep (`int`, *optional*, defaults to 0): Rows of each stream to keep for [`replay`], evenly from all batches.
        batches (`int`, *optional*, defaults to 0): How many batches these are.
    """

    def __init__(
        self,
        streams: Mapping[int, RowStream],
        placements: Sequence[Placement],
        shapes: Mapping[str, tuple[int, torch.dtype]],
        processes: Processes,
        device: torch.device,
        ahead: bool = False,
        keep: int = 0,
        batches: int = 0,
    ) -> None:
        self.streams, self._iterators = streams, {number: iter(stream) for number, stream in streams.items()}
        rank = processes.rank
        self._shapes, self._rows, self._rank, self._device, self._ahead = shapes, processes.rows, rank, device, ahead
        wanted = {
            (number, placement.hookpoint, processes.owner(number), target)
            for placement in placements
            for target in placement.ranks
            for number in placement.streams_of(target)
        }
        # In one order everywhere, so that sends and receives meet.
        self._routes = sorted(route for route in wanted if route[2] != route[3] and rank in route[2:])
        self._own = [(number, name) for number, name, _, target in sorted(wanted) if target == rank]
        self._keep, self._batches = min(keep, batches * processes.rows), batches
        self._seen = dict.fromkeys(streams, 0)  # batches of each stream that were drawn
        self._kept: dict[int, list[dict[str, Tensor]]] = {number: [] for number in streams}
        self._replaying = False
        self._drawn: dict[int, dict[str, Tensor]] = {}  # rows of a saved state that were on their way
        self._pending: tuple[dict, list] | None = None
        self._batch: dict[tuple[int, str], Tensor] = {}
        self._joined: dict[tuple, Tensor] = {}

    def advance(self) -> None:
        """Go to the next batch. Raises [`EndOfStates`] where a stream has none."""
        pending = self._pending or self._send()
        for work in pending[1]:
            work.wait()
        self._batch, self._joined = pending[0], {}
        self._pending = self._send() if self._ahead else None

    def _next(self, number: int) -> dict[str, Tensor]:
        """A stream's next rows, or next kept ones. Raises [`EndOfStates`] where it has no more."""
        if self._replaying:
            joined, start = self._kept[number][0], self._seen[number] * self._rows
            self._seen[number] += 1
            return {name: rows[start : start + self._rows] for name, rows in joined.items()}
        rows = next(self._iterators[number], None)
        if rows is None or len(next(iter(rows.values()))) < self._rows:
            raise EndOfStates(
                f"The hidden states are at their end after {self.streams[number].tokens_seen:,} rows. A run needs "
                "`tokens`, and `eval_tokens` before them where no `heldout` is given: give more, or lower these."
            )
        done, self._seen[number] = self._seen[number], self._seen[number] + 1
        if done < self._batches:
            # Rows are in random order: the first are as good as any.
            wanted = (done + 1) * self._keep // self._batches - done * self._keep // self._batches
            if wanted:
                self._kept[number].append({name: states[:wanted].clone() for name, states in rows.items()})
        return rows

    def replay(self) -> int:
        """From now on give the rows that were kept, and return how many batches of them there are.

        These are of the whole run, where later rows may be of other text. All processes call this.
        """
        for number, parts in self._kept.items():
            self._kept[number] = [_joined(parts)] if parts else []
        counts = [len(next(iter(parts[0].values()))) if parts else 0 for parts in self._kept.values()]
        fewest = torch.tensor(min(counts, default=self._keep) // self._rows, device=self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(fewest, dist.ReduceOp.MIN)
        if int(fewest):
            if self._pending is not None:
                for work in self._pending[1]:
                    work.wait()
            self._replaying, self._pending, self._drawn = True, None, {}
            self._seen = dict.fromkeys(self._seen, 0)
            self._ahead = False
        return int(fewest)

    def _send(self) -> tuple[dict, list]:
        """Draw from this process's streams, and have what others need on its way."""
        drawn = {number: self._drawn.pop(number, None) or self._next(number) for number in self._iterators}
        batch = {(number, name): rows for number, own in drawn.items() for name, rows in own.items()}
        operations = []
        for number, name, source, target in self._routes:
            if source == self._rank:
                rows = batch[number, name].contiguous()
                operations.append(dist.P2POp(dist.isend, rows, target))
            else:
                width, dtype = self._shapes[name]
                rows = torch.empty(self._rows, width, dtype=dtype, device=self._device)
                operations.append(dist.P2POp(dist.irecv, rows, source))
            batch[number, name] = rows
        return batch, dist.batch_isend_irecv(operations) if operations else []

    def rows(self, hookpoint: str, streams: tuple[int, ...]) -> Tensor:
        """The rows `(n, D)` of some streams, in their order, in the batch at hand."""
        key = (hookpoint, streams)
        if key not in self._joined:
            parts = [self._batch[number, hookpoint] for number in streams]
            self._joined[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._joined[key]

    def num_not_finite(self) -> int:
        """Hidden states of the whole run that were left out because they are not finite; all processes ask at once."""
        own = sum(getattr(stream, "num_not_finite", 0) for stream in self.streams.values())
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return own
        total = torch.tensor(own, device=self._device)
        dist.all_reduce(total)
        return int(total)

    def state_dict(self) -> dict[int, Any]:
        """The state of each of this process's streams, with the rows that are on their way."""
        on_the_way = {} if self._pending is None else self._pending[0]
        states = {}
        for number, stream in self.streams.items():
            drawn = {name: rows for (of, name), rows in on_the_way.items() if of == number}
            kept = {"rows": _joined(self._kept[number]), "seen": self._seen[number]}
            states[number] = {"stream": stream.state_dict(), "drawn": drawn or self._drawn.get(number), "kept": kept}
        return states

    def load_state_dict(self, states: dict[int, Any]) -> None:
        """Go on from what [`state_dict`] gave, here or in the processes that owned these streams."""
        for number, stream in self.streams.items():
            stream.load_state_dict(states[number]["stream"])
            if states[number]["drawn"]:
                self._drawn[number] = {name: rows.to(self._device) for name, rows in states[number]["drawn"].items()}
            kept = states[number].get("kept")
            if kept is None:  # a run of an earlier version reads on at its end
                self._batches = 0
                continue
            rows = {name: part.to(self._device) for name, part in kept["rows"].items()}
            self._kept[number], self._seen[number] = [rows] if rows else [], kept["seen"]

    def close(self) -> None:
        """End what runs in the background, and let go of the rows."""
        if self._pending is not None:
            for work in self._pending[1]:
                work.wait()
        self._pending, self._batch, self._joined = None, {}, {}
        for stream in self.streams.values():
            stream.close()


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several batches together."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
