"""Match patterns over tokens in rows of tokens.

Each token becomes one character and the pattern a regular expression over these characters, so that the engine of the
`regex` library does the matching. Characters are assigned anew for each pattern: tokens that the pattern cannot tell
apart lie next to each other, so that a class of 100,000 tokens is a few ranges.

Every match counts, from every start, long or short: the mask is 1 at each token at which some match ends. The engine
returns one match at a time, so the search is repeated, with a mark at each end it has reached: behind the tokens of a
row stands a flag for each place, and the expression ends in a look-ahead to the flag of the place it has come to.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

from . import nodes
from .limits import check_copies
from .parser import Names, parse
from .vocabulary import UnreadableRegex, Vocabulary, vocabulary_of


_FIRST, _LAST = 0x20000, 0x10FFFF  # characters without capitals or any other meaning to the engine
_OPEN, _TAKEN = "o", "x"  # the flags: no match is known to end here, or one is
_NOTHING = "-"  # no token: stands for padding
_LONGEST = 250_000  # characters of an expression
_MOST_WRITTEN = 20 * _LONGEST  # of all its parts together
_MOST_IN_PREFIX = 64  # repeats that [prefix ...] takes apart


class TokenPattern:
    r"""A pattern for one tokenizer; made by [`TokenPattern.compile`].

    Example:
    ```python
    >>> induction = TokenPattern.compile("[a=.].*[a]", tokenizer)
    >>> digit = TokenPattern.compile(r"[re `\s?\d+`]", tokenizer)
    >>> mask = digit.mask(tokenizer("In 1984", return_tensors="pt")["input_ids"])
    ```
    """

    def __init__(self, source: str, expression: "_Expression") -> None:
        self.source = source
        self._characters = expression.characters
        self._expression = expression.text
        self._compiled: dict[int, regex.Pattern] = {}

    @classmethod
    def compile(cls, source: str, tokenizer: Any, names: Names | None = None, timeout: float = 5.0) -> "TokenPattern":
        """Compile a pattern; `patterns.parser` documents the syntax.

        Args:
            source (`str`): The pattern.
            tokenizer: Tokenizer whose tokens the pattern matches. Its vocabulary is decoded once and cached.
            names (`dict`, *optional*): More named patterns (`str`), and sets of texts (`list[str]`).
            timeout (`float`, *optional*, defaults to 5.0): Seconds in which the tokens it names must be found.

        Raises:
            `ValueError`: if it cannot be read, is too large or takes too long, or its texts are not whole tokens; the
                message shows the place.
        """
        vocabulary = vocabulary_of(tokenizer)
        try:
            node, whole = parse(source, names)
            try:
                return cls(source, _Expression(node, vocabulary, time.monotonic() + timeout))
            except _Unwritable as problem:
                raise whole.error(str(problem), problem.at) from problem.__cause__
        except (RecursionError, MemoryError):
            raise ValueError("The pattern is too large: its parts are nested too deep. Nest less.") from None

    def mask(self, token_ids: Tensor, timeout: float = 2.0, attention_mask: Tensor | None = None) -> Tensor:
        """Return a mask of the tokens at which matches end.

        Args:
            token_ids (`Tensor` of shape `(N, T)`): Rows of token ids; a match lies within one row.
            timeout (`float`, *optional*, defaults to 2.0): Seconds for all rows together.
            attention_mask (`Tensor` of shape `(N, T)`, *optional*): 0 at padding, which no pattern matches.

        Returns:
            `Tensor` of shape `(N, T)`, bool, on the CPU: 1 at the last token of each match. A match without tokens
            does not count.

        Raises:
            `ValueError`: if the search takes longer than `timeout`.
        """
        if token_ids.dim() != 2 or token_ids.is_floating_point():
            raise ValueError(f"Expected token ids of shape (N, T), got {token_ids.dtype} {tuple(token_ids.shape)}.")
        rows = token_ids.cpu()
        real = torch.ones_like(rows, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
        mask = torch.zeros(rows.shape, dtype=torch.bool)
        deadline = time.monotonic() + timeout
        try:
            for number in range(len(rows)):
                places = real[number].nonzero().flatten()
                ends = list(self._ends(rows[number, places], rows.shape[1], deadline))
                mask[number, places[ends]] = True
        except TimeoutError:
            raise ValueError(
                f"The pattern {self.source!r:.200} takes longer than {timeout:g} seconds on {tuple(rows.shape)} "
                "tokens. Avoid repeats inside repeats, give repeats an upper bound as in .{0,20}, or raise `timeout`."
            ) from None
        return mask

    def _ends(self, tokens: Tensor, width: int, deadline: float) -> Iterator[int]:
        """Yield the last token of each match in a row, each once; flags stand `width` characters behind the places."""
        pattern = self._compiled.get(width)
        if pattern is None:
            try:
                pattern = regex.compile(f"(?:{self._expression})(?=[\\s\\S]{{{width}}}{_OPEN})", regex.VERSION0)
            except (RecursionError, MemoryError):
                raise ValueError(f"The pattern {self.source!r:.200} is too large. Repeat and nest less.") from None
            except regex.error as error:
                raise ValueError(f"The pattern {self.source!r:.200} cannot be used: {error.msg}.") from error
            self._compiled[width] = pattern
        flags = [_OPEN] * (len(tokens) + 1)
        text, start = self._text(tokens).ljust(width, _NOTHING), 0
        while True:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError
            try:
                match = pattern.search(text + "".join(flags), start, timeout=seconds)
            except MemoryError:
                raise TimeoutError from None  # memory for backtracking grows with time
            if match is None:
                return
            # No earlier start has a match that ends at an open place, nor will it: places only close.
            start, end = match.span()
            flags[end] = _TAKEN
            if end > start:
                yield end - 1

    def _text(self, tokens: Tensor) -> str:
        ids = tokens.numpy().astype(np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() + _FIRST > _LAST):
            raise ValueError(f"Token ids lie between 0 and {_LAST - _FIRST}, got {ids.min()} to {ids.max()}.")
        known = ids < len(self._characters)
        codes = np.where(known, self._characters[np.where(known, ids, 0)], ids + _FIRST)
        return codes.astype("<u4").tobytes().decode("utf-32-le")


class _Unwritable(ValueError):
    """A part that cannot be written as a regular expression; `at` is its place in the source."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


class _Expression:
    """The tree of a pattern as a regular expression over characters.

    Args:
        node ([`Node`]): The tree.
        vocabulary ([`Vocabulary`]): The tokenizer's vocabulary.
        deadline (`float`): Time on the monotonic clock by which it must be written.
    """

    def __init__(self, node: nodes.Node, vocabulary: Vocabulary, deadline: float) -> None:
        self.vocabulary, self.deadline, self._written = vocabulary, deadline, 0
        if vocabulary.size + _FIRST > _LAST:
            raise ValueError(f"Patterns take vocabularies of up to {_LAST - _FIRST} tokens, got {vocabulary.size}.")
        self.classes = {part: self._class(part) for part in nodes.walk(node) if isinstance(part, nodes.TokenRegex)}
        self.characters = _FIRST + _places(vocabulary.size, self.classes, self._in_time)
        self.text = self.write(node)
        try:
            check_copies(self.text)
        except ValueError as error:
            raise _Unwritable(str(error), node.at) from error

    def _in_time(self, node: nodes.Node) -> None:
        if time.monotonic() > self.deadline:
            raise _Unwritable("finding the tokens of this pattern takes too long. Name fewer of them.", node.at)

    def _class(self, node: nodes.TokenRegex) -> np.ndarray:
        self._in_time(node)
        try:
            tokens = self.vocabulary.matching(node.regex, node.search, self.deadline)
        except UnreadableRegex as error:
            raise _Unwritable(str(error), node.at if error.at is None else node.regex_at + error.at) from error
        if not len(tokens):
            more = "" if node.search else " A token's leading space counts; `, search=True` looks for a part of it."
            raise _Unwritable(f"no token matches `{node.regex}`.{more}", node.at)
        return tokens

    def write(self, node: nodes.Node) -> str:
        """Return the expression of a part."""
        text = self._write(node)
        self._written += len(text)
        if len(text) > _LONGEST or self._written > _MOST_WRITTEN:
            raise _Unwritable("written out, the pattern is too long. Repeat less, or by {n}.", node.at)
        return text

    def _write(self, node: nodes.Node) -> str:  # noqa: C901 (one case for each kind of node)
        match node:
            case nodes.AnyToken():
                return f"[{chr(_FIRST)}-{chr(_LAST)}]"
            case nodes.Begin():
                separator = self.vocabulary.separator
                behind = "" if separator is None else f"|(?<={self._tokens([separator])})"
                return f"(?:\\A{behind})"
            case nodes.Text():
                self._in_time(node)
                try:
                    return self._tokens(self.vocabulary.tokens(node.text))
                except ValueError as error:
                    raise _Unwritable(str(error), node.at) from error
            case nodes.TokenRegex():
                return _ranges(self.characters[self.classes[node]])
            case nodes.Joined():
                return "".join(map(self.write, node.parts))
            case nodes.Choice():
                return f"(?:{'|'.join(map(self.write, node.parts))})"
            case nodes.Repeat():
                return f"(?:{self.write(node.part)}){_bounds(node.low, node.high)}"
            case nodes.Capture():
                return f"(?P<{node.name}>{self.write(node.part)})"
            case nodes.BackReference():
                return f"(?P={node.name})"
            case nodes.Look():
                sign = ("" if node.ahead else "<") + ("!" if node.negative else "=")
                return f"(?{sign}{self.write(node.part)})"
            case nodes.Prefix():
                return self._beginnings(node.part, "")

    def _tokens(self, tokens: list[int]) -> str:
        return "".join(chr(self.characters[token]) for token in tokens)

    def _beginnings(self, node: nodes.Node, rest: str) -> str:
        """Return an expression for any beginning, of one token or more, of a match of the part followed by `rest`."""
        match node:
            case nodes.Text():
                signs = self.write(node)
                ways = [f"{signs[:i]}(?={signs[i:]}{rest})" for i in range(1, len(signs) + 1)]
            case nodes.Joined():
                ways, before = [], ""
                for place, part in enumerate(node.parts):
                    behind = "".join(map(self.write, node.parts[place + 1 :]))
                    ways.append(before + self._beginnings(part, behind + rest))
                    before += self.write(part)
            case nodes.Choice():
                ways = [self._beginnings(part, rest) for part in node.parts]
            case nodes.Repeat():
                ways = self._repeated_beginnings(node, rest)
            case _:
                ways = [f"{self.write(node)}(?={rest})"]
        text = f"(?:{'|'.join(ways)})"
        self._written += len(text)
        if len(text) > _LONGEST or self._written > _MOST_WRITTEN:
            raise _Unwritable("written out, the prefix is too long. Repeat less inside it.", node.at)
        return text

    def _repeated_beginnings(self, node: nodes.Repeat, rest: str) -> list[str]:
        part = f"(?:{self.write(node.part)})"
        if max(node.low, node.high or 0) > _MOST_IN_PREFIX:
            raise _Unwritable(f"repeats inside [prefix ...] go to {_MOST_IN_PREFIX}.", node.at)
        # One copy of the part is cut; the copies that the lower bound demands may lie before it or behind it.
        if node.high is None:
            ways = []
            for before in range(max(1, node.low)):
                many = _bounds(before, None if before == max(1, node.low) - 1 else before)
                behind = f"{part}{_bounds(max(0, node.low - before - 1), None)}"
                ways.append(f"{part}{many}{self._beginnings(node.part, behind + rest)}")
            return ways
        ways = []
        for before in range(node.high):
            behind = f"{part}{_bounds(max(0, node.low - before - 1), node.high - before - 1)}"
            ways.append(f"{part}{_bounds(before, before)}{self._beginnings(node.part, behind + rest)}")
        return ways


def _places(
    size: int, classes: dict[nodes.TokenRegex, np.ndarray], in_time: Callable[[nodes.Node], None]
) -> np.ndarray:
    """Return a place for each token, `(V,)`, such that tokens in the same classes follow each other."""
    kind = np.zeros(size, dtype=np.int64)
    for node, members in classes.items():
        in_time(node)
        kind *= 2
        kind[members] += 1
        kind = np.unique(kind, return_inverse=True)[1].reshape(-1)
    places = np.empty(size, dtype=np.int64)
    places[np.argsort(kind, kind="stable")] = np.arange(size)
    return places


def _ranges(codes: np.ndarray) -> str:
    """Return a character class of these code points."""
    codes = np.sort(codes)
    breaks = np.flatnonzero(np.diff(codes) > 1)
    firsts, lasts = codes[np.r_[0, breaks + 1]], codes[np.r_[breaks, len(codes) - 1]]
    return "[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(firsts, lasts, strict=True)) + "]"


def _bounds(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"
