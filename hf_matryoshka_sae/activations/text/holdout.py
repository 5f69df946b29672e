"""A share of the documents kept from training, where no evaluation set is named."""

import zlib
from typing import Any

from .documents import Documents


class Split:
    """The documents that training uses, or those held out.

    A checksum of its text decides a document's side: the same in every process, epoch and run, with no list to keep,
    and equal documents are never on both sides.

    Args:
        documents ([`Documents`]): All documents.
        fraction (`float`): Share of the documents that is held out.
        held_out (`bool`): Read the held-out documents, rather than the rest.
    """

    def __init__(self, documents: Documents, fraction: float, held_out: bool) -> None:
        self._documents, self._fraction, self._held_out = documents, fraction, held_out

    def take(self, count: int) -> list[str]:
        """Return at most `count` documents of this side, an empty list at the end of the epoch."""
        texts: list[str] = []
        while not texts:
            both_sides = self._documents.take(count)
            if not both_sides:
                break
            texts = [text for text in both_sides if self._is_held_out(text) == self._held_out]
        return texts

    def _is_held_out(self, text: str) -> bool:
        return zlib.crc32(text.encode("utf-8", "surrogatepass")) < self._fraction * 2**32

    def next_epoch(self) -> None:
        """Start again, in the next epoch's order."""
        self._documents.next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the documents."""
        return self._documents.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._documents.load_state_dict(state)
