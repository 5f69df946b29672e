"""Sources of hidden states: the protocol of all sources, and the sources that need no language model.

A row is one token's hidden state at each hookpoint (the source), and where an SAE is to give something else than its
input, that as well (the target). A mask says which rows count. All are read through one protocol, [`RowStream`]:

    text through a language model       ActivationStream
    a cache of hidden states            CachedActivationStream
    tensors, a data set, an iterator    StatesStream
    any of these, read ahead            PrefetchedStream

Shapes: N rows, D width of a hookpoint.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..common.seeds import derived_seed
from .shuffled import ShuffledStream


ONE = "states"
"""The name of the rows of a source that names none."""

_RUN_OF_DATASET = 64  # rows of a data set that are read together: one by one is slow
_MOST_RUNS = 2**22  # runs of a table; the permutation of an epoch is of this length at most
_SAMPLED_ROWS = 64  # rows whose digest tells one source from another
_PIECE = 8192  # held-out rows that are read at once


@runtime_checkable
class RowStream(Protocol):
    """Shuffled batches of rows, `{name: (n, D)}`, that training reads; names are hookpoints and [`target_of`] these.

    `peek` gives rows without using them up, a state makes another stream go on with the same rows, and `close` ends
    threads that read ahead.
    """

    hookpoints: list[str]
    batch_size: int
    buffer_tokens: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def __next__(self) -> dict[str, Tensor]: ...

    def peek(self, count: int, chunk_size: int = ..., advance: Callable[[int], Any] = ...) -> Iterator[dict]:
        """Yield the next rows in chunks, at most `count`, without using them up."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue; tensors and JSON-able values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""

    def close(self) -> None:
        """End threads that read ahead."""


@dataclass
class States:
    """The rows of one hookpoint.

    Args:
        source (`Tensor` of shape `(N, D)`): Input of an SAE.
        target (`Tensor` of shape `(N, D)`, *optional*): What it is to reconstruct; by default its input.
        mask (`Tensor` of shape `(N,)`, *optional*): Booleans, true for rows that count; by default all.
    """

    source: Tensor
    target: Tensor | None = None
    mask: Tensor | None = None


def target_of(hookpoint: str) -> str:
    """Return the name of a hookpoint's targets in a batch of rows."""
    return f"{hookpoint} (target)"


def rows_of(states: Any, hookpoints: Sequence[str]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the tensors of some states by name, without copying them, and which rows count: `None` for all.

    Args:
        states (`Tensor`, [`States`], an array, or a mapping of such by hookpoint): All of one length.
        hookpoints (`list[str]`): Keys of a mapping to read; one name for what is no mapping.

    Raises:
        `ValueError`: if a hookpoint is missing, lengths differ, or states are no matrix.
    """
    if not isinstance(states, Mapping):
        if len(hookpoints) != 1:
            names = ", ".join(hookpoints)
            raise ValueError(f"States of several hookpoints ({names}) must be given by name: {{hookpoint: (N, D)}}.")
        states = {hookpoints[0]: states}
    rows, masks = {}, []
    for name in hookpoints:
        if name not in states:
            raise ValueError(f"There are no states of hookpoint {name!r}; given are {', '.join(map(str, states))}.")
        value = states[name]
        value = value if isinstance(value, States) else States(value)
        rows[name] = torch.as_tensor(value.source)
        if value.target is not None:
            rows[target_of(name)] = torch.as_tensor(value.target)
        if value.mask is not None:
            masks.append(torch.as_tensor(value.mask).bool())
    lengths = {len(values) for values in (*rows.values(), *masks)}
    wrong = {name: tuple(values.shape) for name, values in rows.items() if values.ndim != 2}
    if wrong or len(lengths) > 1 or any(mask.ndim != 1 for mask in masks):
        shapes = {name: tuple(values.shape) for name, values in rows.items()}
        raise ValueError(
            f"States must be (N, D), all of one length, and masks (N,); got {shapes} and masks "
            f"{[tuple(mask.shape) for mask in masks]}."
        )
    return rows, torch.stack(masks).all(0) if masks else None


class RowTable:
    """States of which any row can be read, so that a run over them can resume exactly.

    Args:
        states (see [`rows_of`], or a `datasets.Dataset` with a column of vectors for each hookpoint): All rows.
        hookpoints (`list[str]`, *optional*): Hookpoints to read; by default all names in `states`, or `"states"`.
        index (`Tensor`, *optional*): Numbers of the rows that this table has, ascending; by default all.
    """

    def __init__(self, states: Any, hookpoints: Sequence[str] = (), index: Tensor | None = None) -> None:
        self.states, self.is_dataset = states, hasattr(states, "column_names")
        self.hookpoints = list(hookpoints) or _names(states)
        if self.is_dataset:
            columns = [name if name in states.column_names else ONE for name in self.hookpoints]
            if unknown := sorted(set(columns) - set(states.column_names)):
                known = ", ".join(states.column_names)
                raise ValueError(f"The data set has no column {unknown[0]!r} of states; it has {known}.")
            self._columns = dict(zip(self.hookpoints, columns, strict=True))
            self._dataset, self._mask = states.with_format("torch", columns=columns), None
            total = len(states)
        else:
            self._rows, self._mask = rows_of(states, self.hookpoints)
            total = len(next(iter(self._rows.values())))
        if index is None:
            index = torch.arange(total)
        self.index = index if self._mask is None else index[self._mask.cpu()[index]]
        if len(self) == 0:
            raise ValueError("There are no states to train on: all rows are masked, or there is none.")

    def __len__(self) -> int:
        return len(self.index)

    def take(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return the rows of these numbers, from 0 to the table's length."""
        chosen = self.index[numbers]
        if self.is_dataset:
            columns = self._dataset[chosen.tolist()]
            return rows_of({name: columns[column] for name, column in self._columns.items()}, self.hookpoints)[0]
        return {name: values.index_select(0, chosen.to(values.device)) for name, values in self._rows.items()}

    def split(self, count: int, seed: int) -> tuple["RowTable", "RowTable"]:
        """Return two tables that share no row; the second has `count` rows, chosen by `seed`."""
        generator = torch.Generator().manual_seed(derived_seed(seed, "held-out rows"))
        mixed = self.index[torch.randperm(len(self), generator=generator)]
        parts = mixed[count:].sort().values, mixed[:count].sort().values
        first, second = (RowTable(self.states, self.hookpoints, part) for part in parts)
        return first, second

    def digest(self) -> str:
        """Return a digest of some rows, by which two tables can be told apart."""
        hashed = hashlib.sha256(str(len(self)).encode())
        sample = torch.linspace(0, len(self) - 1, min(len(self), _SAMPLED_ROWS)).round().long()
        for name, values in self.take(sample).items():
            hashed.update(name.encode() + values.detach().cpu().double().numpy().tobytes())
        return hashed.hexdigest()[:16]

    def batches(self, name: str, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """Yield the states of a hookpoint in their order, in chunks: share `rank` of `world_size`."""
        for numbers in torch.arange(rank, len(self), world_size).split(_PIECE):
            yield self.take(numbers)[name]


def is_table(states: Any) -> bool:
    """Return whether any row of some states can be read: true unless they are an iterator or a function."""
    if isinstance(states, Mapping):
        return all(map(is_table, states.values()))
    return isinstance(states, Tensor | States) or hasattr(states, "column_names") or hasattr(states, "__array__")


def _names(states: Any) -> list[str]:
    if hasattr(states, "column_names"):
        return list(states.column_names)
    return list(states) if isinstance(states, Mapping) else [ONE]


class _OfTable:
    """A reader's share of a table's rows, endlessly, each epoch in another order that follows from the seed."""

    def __init__(self, table: RowTable, seed: int, rank: int, world_size: int) -> None:
        self._table, self._seed, self._rank, self._world = table, seed, rank, world_size
        self._run = max(_RUN_OF_DATASET if table.is_dataset else 1, -(-len(table) // _MOST_RUNS))
        if -(-len(table) // self._run) < world_size:
            raise ValueError(f"{len(table)} rows of states are too few for {world_size} readers.")
        self.digest, self._epoch, self._order = table.digest(), -1, torch.empty(0, dtype=torch.long)
        self._at = self._first = 0  # rows read; those of epochs that are over

    def read(self, count: int) -> dict[str, Tensor]:
        """Return the next rows, at most `count`."""
        if self._at - self._first >= len(self._order):
            self._first += len(self._order)
            self._epoch += 1
            self._order = self._order_of(self._epoch)
        start = self._at - self._first
        numbers = self._order[start : start + count]
        self._at += len(numbers)
        return self._table.take(numbers)

    def _order_of(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self._seed, f"epoch {epoch} of states"))
        runs = torch.randperm(-(-len(self._table) // self._run), generator=generator)[self._rank :: self._world]
        numbers = (runs[:, None] * self._run + torch.arange(self._run)).flatten()
        return numbers[numbers < len(self._table)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._at, "epoch": self._epoch, "first": self._first, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("digest") != self.digest:
            raise ValueError(
                "These states are not those with which the run began. Give the same, or start over with resume=False."
            )
        self._epoch, self._at, self._first = state["epoch"], state["position"], state["first"]
        self._order = self._order_of(self._epoch) if self._epoch >= 0 else torch.empty(0, dtype=torch.long)


class _OfIterator:
    """The rows of an iterator, read once; those of a function that makes it anew can be skipped to a position."""

    def __init__(self, states: Iterable[Any] | Callable[[], Iterable[Any]], hookpoints: Sequence[str]) -> None:
        self._can_go_on, self._hookpoints = callable(states), hookpoints
        self._items = iter(states() if callable(states) else states)
        self._left: dict[str, Tensor] = {}  # rows of the current item that are not yet read
        self._at = 0  # rows read

    def read(self, count: int) -> dict[str, Tensor] | None:
        """Return the next rows, at most `count`, `None` at the end."""
        while not self._left or not len(next(iter(self._left.values()))):
            item = next(self._items, None)
            if item is None:
                return None
            self._left, mask = rows_of(item, self._hookpoints)
            if mask is not None:
                self._left = {name: values[mask.to(values.device)] for name, values in self._left.items()}
        rows = {name: values[:count] for name, values in self._left.items()}
        self._left = {name: values[count:] for name, values in self._left.items()}
        self._at += len(next(iter(rows.values())))
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self._can_go_on:
            raise ValueError(
                "An iterator of states cannot be rewound, so a run over one does not go on from a checkpoint. Give a "
                "function that makes the iterator anew, a tensor or a data set; or start over with resume=False."
            )
        while self._at < state["position"] and self.read(state["position"] - self._at) is not None:
            pass


class StatesStream(ShuffledStream):
    """Shuffled batches of existing states: tensors, a data set, or an iterator's.

    Tables are read endlessly, each epoch in another order, and go on exactly from a state. An iterator is read once
    and cannot go on; a function that makes it anew can, by reading it again up to where it was.

    Args:
        states ([`RowTable`], an iterable of states as in [`rows_of`], or a function that returns one): The rows; of an
            iterable, those of this process.
        hookpoints (`list[str]`): Names of the hookpoints.
        batch_size (`int`): Rows in a batch, in this process.
        buffer_tokens (`int`): Rows the shuffle buffer holds, per hookpoint.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Device of the rows.
        dtype (`torch.dtype`, *optional*): Type of the rows; by default as they are given.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
        rank (`int`, *optional*, defaults to 0): Number of this reader's share of a table.
        world_size (`int`, *optional*, defaults to 1): Number of shares.

    Raises:
        `ValueError`: if the buffer is too small; while reading, if states do not fit [`rows_of`].
    """

    def __init__(
        self,
        states: RowTable | Iterable[Any] | Callable[[], Iterable[Any]],
        hookpoints: Sequence[str],
        batch_size: int,
        buffer_tokens: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(hookpoints, batch_size, buffer_tokens, batch_size, seed + rank)
        self._device, self._dtype = device, dtype
        if isinstance(states, RowTable):
            self._source: _OfTable | _OfIterator = _OfTable(states, seed, rank, world_size)
        else:
            self._source = _OfIterator(states, hookpoints)

    def _read(self) -> dict[str, Tensor] | None:
        rows = self._source.read(self.rows_per_read)
        if rows is None:
            return None
        return {name: values.detach().to(self._device, self._dtype or values.dtype) for name, values in rows.items()}

    def _row_device(self) -> torch.device | str:
        return self._device

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue: the position, waiting rows, generator."""
        return super().state_dict() | {"source": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, given the same states.

        Raises:
            `ValueError`: if the states differ, or are an iterator, which cannot be rewound.
        """
        super().load_state_dict(state)  # which ends the thread that reads ahead
        self._source.load_state_dict(state["source"])
