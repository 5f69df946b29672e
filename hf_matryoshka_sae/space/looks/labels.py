"""What a latent is called: by somebody who named it, else by the tokens on which it fires most."""

from functools import lru_cache
from typing import Any

from ...common.token_text import LOST
from ...features import FeatureIndex
from ...features.patterns.vocabulary import vocabulary_of


_TOKENS = 3
_ALL_AT_ONCE = 2**15
"""Of an index with more latents, contexts are not all read: labels are of the own tokens that it stores, or, where an
earlier version did not, of one latent at a time."""


class Labels:
    """What to write beside a latent's number; read from its index.

    Args:
        index ([`FeatureIndex`], *optional*): Without one there are no labels.
        tokenizer: Of the language model.
    """

    def __init__(self, index: FeatureIndex | None, tokenizer: Any) -> None:
        self.index = index
        self._texts = vocabulary_of(tokenizer).texts
        self.given = {} if index is None else _given(index)
        self._all: list[str] | None = None
        if index is not None and (len(index) <= _ALL_AT_ONCE or "own_tokens" in index.columns):
            few = len(index) <= _ALL_AT_ONCE
            tokens = index.peak_tokens() if few else index.table(["own_tokens"])["own_tokens"].to_pylist()
            spelled = (self._short(peaks or []) for peaks in tokens)
            self._all = [self.given.get(latent) or short for latent, short in enumerate(spelled)]
        self._one = lru_cache(maxsize=4096)(self._read)

    def __contains__(self, latent: int) -> bool:
        return self.index is not None and 0 <= latent < len(self.index)

    def __getitem__(self, latent: int) -> str:
        if self.index is None:
            return ""
        return self._one(latent) if self._all is None else self._all[latent]

    def search(self, text: str) -> list[int]:
        """The latents whose label holds a text, in any case.

        Raises:
            `ValueError`: if there are too many latents to look at.
        """
        if self._all is None:
            raise ValueError(f"Labels can be looked through in an index of at most {_ALL_AT_ONCE:,} latents.")
        return [latent for latent, label in enumerate(self._all) if text.casefold() in label.casefold()]

    def _read(self, latent: int) -> str:
        assert self.index is not None
        if latent in self.given:
            return self.given[latent]
        return self._short([int(c.token_ids[c.peak]) for c in self.index.contexts(latent) if c.kind == "top"])

    def _short(self, peaks: list[int]) -> str:
        """The most frequent of the tokens, first come first."""
        count: dict[str, int] = {}
        for token in peaks:
            text = self._texts[token] if token < len(self._texts) else "?"
            text = text.strip().replace(LOST, "⋯") or repr(text)[1:-1].replace(" ", "␣")
            count[text] = count.get(text, 0) + 1
        return " · ".join(sorted(count, key=lambda text: -count[text])[:_TOKENS])


def _given(index: FeatureIndex) -> dict[int, str]:
    """The labels that came with the index, by place in the SAE: elsewhere a latent goes by its first number."""
    if not index.labels:
        return {}
    numbers = index.table(["latent_id"])["latent_id"].to_pylist()
    return {place: index.labels[number] for place, number in enumerate(numbers) if index.labels.get(number)}
