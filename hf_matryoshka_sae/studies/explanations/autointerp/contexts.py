"""Passages around tokens: those on which a latent fires, those on which it does not, and marks in them.

After SAEBench 0.6.0: a passage is a token with ten on either side; a latent is active on a token where it reaches 1%
of the largest activation in the text that examples come from; passages of a latent are those around its strongest
activations, and around others drawn in proportion to their activation (importance-weighted).

A passage does not reach over a token that is left out (special tokens, padding) nor out of its window.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import maximum_filter1d

from ....common.token_text import texts_in_place
from ....features.firings import span
from ..n2g import Examples, evenly


BUFFER = 10
ACTIVE = 0.01
OPEN, CLOSE, LINE_BREAK = "«", "»", "⏎"
_LOOKALIKES = str.maketrans({OPEN: "‹", CLOSE: "›", "\n": LINE_BREAK, "\r": None})


@dataclass(frozen=True)
class Context:
    """A passage and what a latent does in it.

    Args:
        row (`int`), start (`int`), stop (`int`): Which tokens of which window.
        ids (`tuple[int, ...]`): The tokens.
        values (`np.ndarray` of shape `(n,)`): The latent's activation on each, float64.
        active (`np.ndarray` of shape `(n,)`): Where it is active, bool.
    """

    row: int
    start: int
    stop: int
    ids: tuple[int, ...]
    values: np.ndarray
    active: np.ndarray


class LatentContexts:
    """The passages of one latent in a text.

    Args:
        found ([`Examples`]): Where it fires.
        latent (`int`): Which one.
        least (`float`): The activation from which on it is active.
        buffer (`int`, *optional*, defaults to 10): Tokens on either side.
    """

    def __init__(self, found: Examples, latent: int, least: float, buffer: int = BUFFER) -> None:
        self._windows, self._keep = found.windows.numpy(), found.keep.numpy()
        self._values = found.dense(latent).numpy().astype(np.float64)
        self._active = (self._values >= least) & (self._values > 0) & self._keep
        self._buffer = buffer

    def firing(self, top: int, weighted: int, generator: np.random.Generator) -> list[Context]:
        """Passages around its `top` strongest activations, then around `weighted` others, importance-weighted.

        They do not overlap as long as there are enough that do not; fewer where it fires less often.
        """
        places = np.flatnonzero(self._active)
        values = self._values.reshape(-1)[places]
        strongest = places[np.argsort(-values, kind="stable")]
        # The order of exponential clocks with the activations as rates is a weighted draw without replacement.
        clocks = generator.exponential(size=len(places)) / values
        chosen = self._apart(strongest, [], top)
        return [self._around(place) for place in self._apart(places[np.argsort(clocks)], chosen, top + weighted)]

    def spread(self, top: int, more: int, generator: np.random.Generator) -> list[Context]:
        """Passages around its `top` strongest activations, then around `more` drawn evenly over the ranks of all."""
        places = np.flatnonzero(self._active)
        values = self._values.reshape(-1)[places]
        strongest = places[np.argsort(-values, kind="stable")]
        drawn = places[evenly(values, 2 * more, generator)]  # twice as many, as some overlap
        chosen = self._apart(strongest, [], top)
        mixed = generator.permutation(drawn)
        return [self._around(place) for place in self._apart(np.concatenate([mixed, strongest]), chosen, top + more)]

    def silent(self, count: int, generator: np.random.Generator) -> tuple[list[Context], bool]:
        """Passages drawn from those in which it is not active, and whether there are enough.

        Where there are not, those in which it is weakest fill up.
        """
        peaks = maximum_filter1d(
            np.where(self._active, self._values, 0), 2 * self._buffer + 1, axis=1, mode="constant"
        )
        places = generator.permutation(np.flatnonzero(self._keep))
        peaks = peaks.reshape(-1)[places]
        chosen = self._apart(places[peaks == 0], [], count)
        enough = len(chosen) == count
        chosen = self._apart(places[np.argsort(peaks, kind="stable")], chosen, count)
        return [self._around(place) for place in chosen], enough

    def _apart(self, places: np.ndarray, taken: list[int], count: int) -> list[int]:
        """`taken`, filled up to `count` in the order of `places` with what lies apart, then with what does not."""
        length, chosen, others = self._windows.shape[1], list(taken), []
        for place in map(int, places):
            if len(chosen) == count:
                return chosen
            if place in chosen:
                continue
            near = any(abs(place - one) <= 2 * self._buffer and place // length == one // length for one in chosen)
            (others if near else chosen).append(place)
        return chosen + others[: count - len(chosen)]

    def _around(self, place: int) -> Context:
        row, column = divmod(int(place), self._windows.shape[1])
        start, stop = span(self._keep[row], column, self._buffer, self._buffer)
        part = np.s_[row, start:stop]
        ids = tuple(self._windows[part].tolist())
        return Context(row, start, stop, ids, self._values[part], self._active[part])


def wrong_marks(context: Context, generator: np.random.Generator) -> np.ndarray | None:
    """As many tokens as are active in a passage, drawn from the others, as `(n,)` bool; None where all are active."""
    others = np.flatnonzero(~context.active)
    if not len(others):
        return None
    marks = np.zeros(len(context.ids), dtype=bool)
    marks[generator.permutation(others)[: max(1, int(context.active.sum()))]] = True
    return marks


class TokenTexts:
    """What tokens say where they stand.

    Args:
        tokenizer: Of any kind, from transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def of(self, ids: tuple[int, ...]) -> list[str]:
        """What each token adds to the text before it; a character of several tokens stands at the last of them.

        Line breaks are written as ⏎, so that a passage is a line.
        """
        return [text.translate(_LOOKALIKES) for text in texts_in_place(self._tokenizer, ids)]

    def marked(self, ids: tuple[int, ...], marks: np.ndarray) -> str:
        """A passage with marks around runs of tokens."""
        parts, inside = [], False
        for text, mark in zip(self.of(ids), marks.tolist(), strict=True):
            if mark != inside:
                parts.append(OPEN if mark else CLOSE)
            parts.append(text)
            inside = mark
        return "".join([*parts, CLOSE] if inside else parts)
