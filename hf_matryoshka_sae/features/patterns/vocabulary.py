"""The tokens of a tokenizer by their texts, and the tokens of a text."""

import time
import weakref
from typing import Any

import numpy as np
import regex

from ...common.token_text import ANCHOR, LOST, coders, token_texts
from .limits import check_token_regex


_CONTEXTS = ("\n", ANCHOR, "")  # texts before a token; one that continues a word shows behind the first or the last

_known: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Any) -> "Vocabulary":
    """Return the vocabulary of a tokenizer, decoded once for as long as the tokenizer lives."""
    vocabulary = _known.get(tokenizer)
    if vocabulary is None or vocabulary.length != len(tokenizer):  # tokens may have been added
        vocabulary = _known[tokenizer] = Vocabulary(tokenizer)
    return vocabulary


class Vocabulary:
    """The tokens of a tokenizer and their texts.

    Args:
        tokenizer: Any tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.length = len(tokenizer)
        self._encode, self._decode = coders(tokenizer)
        self.size = max(tokenizer.get_vocab().values()) + 1
        self.texts = token_texts(tokenizer, range(self.size))
        # The token before each document where documents are packed one behind the other (see `activations.text`).
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.separator: int | None = bos
        self._matching: dict[tuple[str, bool], np.ndarray] = {}

    def pieces(self, tokens: list[int]) -> list[tuple[str, int]]:
        """Return a row of tokens as texts with their numbers of tokens: several where only together they are text."""
        pieces: list[tuple[str, int]] = []
        broken: list[int] = []
        for token in [*tokens, None]:
            text = LOST if token is None else self.text(token)
            if token is not None and LOST in text:
                broken.append(token)
                continue
            if broken:
                pieces.append((self._decode([broken])[0], len(broken)))
                broken = []
            if token is not None:
                pieces.append((text, 1))
        return pieces

    def text(self, token: int) -> str:
        """Return the text of one token; empty for a token beyond the vocabulary."""
        return self.texts[token] if token < self.size else ""

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text in the middle of another text.

        Raises:
            `ValueError`: if its first or last token would reach beyond it, or it cannot be written in this vocabulary.
        """
        for context in _CONTEXTS:
            before, whole = self._encode(context), self._encode(context + text)
            ids = whole[len(before) :]
            if ids and whole[: len(before)] == before:
                decoded = self._decode([before, whole])
                if decoded[1] == decoded[0] + text:
                    return ids
        parts = [self.text(token) for token in self._encode(text)]
        raise ValueError(
            f"the text {text!r} is not whole tokens; the tokenizer reads it as {parts}. Write these tokens, or use "
            f"[re `...`] on single tokens."
        )

    def matching(self, pattern: str, search: bool, deadline: float) -> np.ndarray:
        """Return the tokens, ascending, whose text a regular expression matches whole, or in part with `search`.

        Args:
            pattern (`str`): The regular expression.
            search (`bool`): Whether a match of a part of the text counts.
            deadline (`float`): Time on the monotonic clock by which all tokens must be matched.

        Raises:
            [`UnreadableRegex`]: if the expression cannot be read or takes too long.
        """
        key = (pattern, search)
        if key not in self._matching:
            compiled = _compiled(pattern)
            matches = compiled.search if search else compiled.fullmatch
            try:
                tokens = [
                    token
                    for token, text in enumerate(self.texts)
                    if matches(text, timeout=max(1e-6, deadline - time.monotonic()))
                ]
            except (TimeoutError, MemoryError):
                raise UnreadableRegex(
                    f"the regular expression {pattern!r:.100} takes too long on this vocabulary. Avoid repeats inside "
                    "repeats, or allow more time."
                ) from None
            self._matching[key] = np.array(tokens, dtype=np.int64)
        return self._matching[key]


class UnreadableRegex(ValueError):
    """A regular expression that cannot be used; `at` is the place of the mistake in it, if that is known."""

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.at = at


def _compiled(pattern: str) -> regex.Pattern:
    what = f"the regular expression {pattern!r:.100}"
    try:
        check_token_regex(pattern)
        return regex.compile(pattern)
    except regex.error as error:
        raise UnreadableRegex(f"{what} cannot be read: {error.msg}.", error.pos) from error
    except (ValueError, OverflowError) as error:
        raise UnreadableRegex(f"{what} cannot be used: {error}") from error
    except (MemoryError, RecursionError):
        raise UnreadableRegex(f"{what} is too large. Repeat and nest less.") from None
