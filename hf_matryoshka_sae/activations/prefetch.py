"""The language model runs ahead of training, in a thread of its own.

A shuffle buffer is refilled in gulps of half its size, so a few batches drawn ahead would not bridge a gulp. What is
done ahead is therefore the reading (tokens, forward pass, move to the rows' device), up to the next gulp; filling the
buffer and drawing from it stay where they are, and so every row comes in the same order as without the thread.
"""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .shuffled import ShuffledStream


class PrefetchedStream:
    """A stream whose next rows are read in a thread, used like the stream itself and giving the same batches.

    The thread starts with the first batch drawn; `peek` before that reads as the wrapped stream does. States of the
    two are interchangeable: rows read ahead are part of them. Taking one pauses the thread after the forward pass it
    is in. An error of the reading is raised where it would have been raised without the thread.

    Args:
        stream ([`ActivationStream`] or [`CachedActivationStream`]): the stream to read ahead. Neither it nor its
            language model is to be used directly from then on, unless `close` was called. Its methods and attributes,
            such as `tokens_seen` and `num_outliers`, are those of this stream too.
    """

    def __init__(self, stream: ShuffledStream) -> None:
        self._stream = stream
        stream.read_ahead()
        # The thread refers to the stream but not to this object, so that it ends when this object is collected, or
        # with the process: torch must not be at work while Python shuts down.
        weakref.finalize(self, stream.close)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return next(self._stream)
