"""Shuffled activations: token batches through the language model, as far as the last hookpoint, into a buffer.

    for rows in ActivationStream(model, tokens, ["model.layers.1"], batch_size=2048, buffer_tokens=2**17):
        rows["model.layers.1"]  # [2048, D], tokens from many sequences

Shapes: B windows of S tokens, N rows in a batch, D width of a hookpoint.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.ahead import ReadAhead
from .buffer import ShuffleBuffer
from .hookpoints import harvest
from .text.tokens import TokenBatch, TokenStream
from .text.windows import WindowShuffle


# So many forward passes in a row without a finite row mean that the model or the hookpoint is at fault, not some text.
_PATIENCE = 8


class ShuffledStream(ABC):
    """Batches drawn from a shuffle buffer which `_read` refills; what live and cached activations have in common.

    Args:
        hookpoints (`list[str]`): names of the rows.
        batch_size (`int`): rows in a batch, in this process.
        buffer_tokens (`int`): rows the shuffle buffer holds, per hookpoint. It is refilled when half empty.
        rows_per_read (`int`): rows that `_read` returns at most.
        seed (`int`): seed of the shuffle.

    Attributes:
        tokens_seen (`int`): rows given out by this process.

    Raises:
        `ValueError`: the buffer cannot hold a batch beside what is read at once.
    """

    def __init__(self, hookpoints: Sequence[str], batch_size: int, buffer_tokens: int, rows_per_read: int, seed: int):
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
        self.tokens_seen = 0

    @abstractmethod
    def _read(self) -> dict[str, Tensor] | None:
        """The next rows in reading order, on their final device and in their final type; `None` at the end."""

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

    def fill(self, advance: Callable[[int], Any] = lambda rows: None) -> None:
        """Reads until the buffer is full or the rows end.

        Args:
            advance (`Callable`, *optional*): told how many rows each read added.

        Raises:
            `ValueError`: nothing that is read can be used.
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
        """The rows that go into the buffer, of those that a read gave; what is left out is counted.

        It is asked when the buffer is filled and not when rows are read, so that counts do not depend on how far ahead
        a thread has come.
        """
        return rows

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
        self, count: int, chunk_size: int = 8192, advance: Callable[[int], Any] = lambda rows: None
    ) -> Iterator[dict[str, Tensor]]:
        """The next rows, at most `count` and at most what the buffer holds, in chunks; they are not used up.

        They are what the next batches hold, unless the buffer is refilled and mixed anew before it comes to them.
        `advance` is told of rows that are read for it, see [`fill`].
        """
        if len(self._buffer) < min(count, max(self.buffer_tokens // 2, self.batch_size)):
            self.fill(advance)
        return self._buffer.peek(count, chunk_size)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: waiting rows, generator, counters; tensors and JSON-able values."""
        self.close()
        return {
            "buffer": self._buffer.state_dict(),
            "ahead": list(self._ahead),
            "exhausted": self._exhausted,
            "tokens_seen": self.tokens_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, given the same data and options."""
        self._forget_ahead()
        self._buffer.load_state_dict({**state["buffer"], "rows": self._placed(state["buffer"]["rows"])})
        self._ahead.extend(self._placed(rows) for rows in state.get("ahead", []))
        self._exhausted, self.tokens_seen = state["exhausted"], state["tokens_seen"]

    def close(self) -> None:
        """Ends the thread of `read_ahead`, at the latest after its forward pass; the next batch starts another."""
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
        """Where the rows lie."""

    def _read_device(self) -> torch.device | str:
        """Where `_read` works."""
        return self._row_device()


class ActivationStream(ShuffledStream):
    """Iterator over batches of hidden states, shuffled across sequences, resumable bit for bit.

    Tokens whose hidden state at some hookpoint is not finite (NaN or infinite) are left out before they are shuffled
    and counted: one of them in a batch would make the whole batch useless.

    Args:
        model (`nn.Module`): a transformers model; it is put in `eval` mode.
        token_stream ([`TokenStream`] or [`WindowShuffle`]): its tokens. How many sequences one forward pass takes is
            set there.
        hookpoints (`list[str]`): as [`resolve_hookpoints`] returns them.
        batch_size (`int`): rows in a batch, in this process.
        buffer_tokens (`int`): rows the shuffle buffer holds, per hookpoint. It is refilled when half empty.
        device (`torch.device`, *optional*): where the rows lie; by default where the model is.
        dtype (`torch.dtype`, *optional*): their type; by default the model's.
        seed (`int`, *optional*, defaults to `0`): seed of the shuffle.
        max_norm_factor (`float`, *optional*): leave out tokens whose norm at some hookpoint exceeds this many times
            the median norm of their token batch.

    Attributes:
        tokens_seen (`int`): rows given out by this process.
        num_outliers (`int`): rows left out by `max_norm_factor`.
        num_not_finite (`int`): rows left out because they are not finite.

    Raises:
        `ValueError`: the buffer cannot hold a batch beside one forward pass, or the windows are longer than the model
            can read; while reading, the hidden states of many forward passes in a row are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        token_stream: TokenStream | WindowShuffle,
        hookpoints: Sequence[str],
        batch_size: int,
        buffer_tokens: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        max_norm_factor: float | None = None,
    ):
        _check_context_length(model, token_stream.context_length)
        tokens_per_forward = token_stream.batch_size_sequences * token_stream.context_length
        super().__init__(hookpoints, batch_size, buffer_tokens, tokens_per_forward, seed)
        self.model, self.token_stream = model.eval(), token_stream
        self._device, self._dtype, self._max_norm_factor = device, dtype, max_norm_factor
        self.num_outliers = self.num_not_finite = 0
        self._passes_without_rows = 0

    def _read(self) -> dict[str, Tensor] | None:
        batch = next(self.token_stream, None)
        if batch is None:
            return None
        rows = harvest_rows(self.model, batch, self.hookpoints)
        if self._max_norm_factor is not None:
            rows = self._without_outliers(rows)
        return {name: to_device(values, self._device or values.device, self._dtype) for name, values in rows.items()}

    def _usable(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        finite = torch.stack([values.isfinite().all(1) for values in rows.values()]).all(0)
        kept = None if finite.all() else finite.nonzero()[:, 0]
        num_kept = len(finite) if kept is None else len(kept)
        self.num_not_finite += len(finite) - num_kept
        self._passes_without_rows = 0 if num_kept else self._passes_without_rows + 1
        if self._passes_without_rows >= _PATIENCE and self.num_not_finite:
            raise ValueError(
                f"No hidden state of {_PATIENCE} forward passes in a row is finite at {', '.join(self.hookpoints)}: "
                "all hold NaN or infinity. Load the language model in another type (`model_dtype: float32` or "
                "bfloat16), or choose another hookpoint."
            )
        if kept is None:
            return rows
        return {name: values.index_select(0, kept) for name, values in rows.items()}

    def _without_outliers(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        outlier = torch.stack([_is_outlier(values, self._max_norm_factor) for values in rows.values()]).any(0)
        kept = (~outlier).nonzero()[:, 0]
        self.num_outliers += len(outlier) - len(kept)
        return {name: values.index_select(0, kept) for name, values in rows.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self._dtype or next(self.model.parameters()).dtype

    def _row_device(self) -> torch.device | str:
        return self._device or self._read_device()

    def _read_device(self) -> torch.device:
        return next(self.model.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: token position, waiting rows, generator; tensors and JSON-able values."""
        state = super().state_dict()  # which ends the thread that reads ahead, and counts
        own = {name: getattr(self, name) for name in ("num_outliers", "num_not_finite")}
        return state | own | {"token_stream": self.token_stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, given the same model, data and options."""
        super().load_state_dict(state)
        self.token_stream.load_state_dict(state["token_stream"])
        self.num_outliers, self.num_not_finite = state["num_outliers"], state.get("num_not_finite", 0)


def harvest_rows(model: nn.Module, batch: TokenBatch, hookpoints: Sequence[str]) -> dict[str, Tensor]:
    """Hidden states at the kept positions of a token batch.

    Args:
        model (`nn.Module`): the language model.
        batch ([`TokenBatch`]): tokens, on any device.
        hookpoints (`list[str]`): where to read.

    Returns:
        `dict[str, Tensor]`: `[N, D]` for each hookpoint, in reading order, on the model's device.
    """
    device = next(model.parameters()).device
    kept = to_device(batch.keep.flatten().nonzero()[:, 0], device)  # counted on the CPU: no wait for the device
    attention_mask = to_device(batch.attention_mask, device) if batch.padded else None
    states = harvest(model, to_device(batch.input_ids, device), attention_mask, hookpoints)
    return {name: values.flatten(0, 1).index_select(0, kept.to(values.device)) for name, values in states.items()}


def to_device(values: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on another device and in another type; from the CPU to a GPU by way of pinned memory, without a wait.

    Args:
        values (`Tensor`): what to move; it comes back as it is where nothing changes.
        device (`torch.device`): where to.
        dtype (`torch.dtype`, *optional*): by default its own.
    """
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        return values.to(dtype or values.dtype).pin_memory().to(device, non_blocking=True)
    return values.to(device, dtype or values.dtype)


def _is_outlier(rows: Tensor, factor: float) -> Tensor:
    norms = torch.linalg.vector_norm(rows.float(), dim=1)
    finite = norms.isfinite()
    return finite & (norms > factor * norms.where(finite, torch.nan).nanmedian())


def _check_context_length(model: nn.Module, context_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(f"`context_length` is {context_length}, but the model reads at most {limit} tokens.")
