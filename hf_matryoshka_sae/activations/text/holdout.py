"""A share of the documents kept from training, where no evaluation set is named."""

import zlib
from typing import Any

from .documents import Documents


class Split:
    """The documents that training uses, or those held out.

    A document's side is told by a checksum of its text: the same in every process, epoch and run, with no list to
    keep, and equal documents are never on both sides.

    Args:
        documents ([`Documents`]): All documents.
        fraction (`float`): Share that is held out.
        held_out (`bool`): Give those, rather than the rest.
    """

    def __init__(self, documents: Documents, fraction: float, held_out: bool):
        self._documents, self._fraction, self._held_out = documents, fraction, held_out

    def take(self, count: int) -> list[str]:
        """At most `count` documents of this side, an empty list at the end of the epoch."""
        texts: list[str] = []
        while not texts:
            read = self._documents.take(count)
            if not read:
                break
            texts = [text for text in read if self._is_held_out(text) == self._held_out]
        return texts

    def _is_held_out(self, text: str) -> bool:
        return zlib.crc32(text.encode("utf-8", "surrogatepass")) < self._fraction * 2**32

    def next_epoch(self) -> None:
        """Start again, in the next epoch's order."""
        self._documents.next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The position in the documents."""
        return self._documents.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._documents.load_state_dict(state)
