"""Properties of tokens that follow from the text alone: labels for probes without labelled data.

A window's tokens are joined to text again, with the place of every token in it, and each property is a function of
that text. A property of a word is a label of the word's last token, where a causal model has read all of it. Special
tokens and blank lines end open quotes, brackets and sentences.

Shapes: B windows, S tokens in a window, T properties.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...activations import TokenBatch
from ...common.token_text import token_texts


WORD_CLASSES = {
    "determiner": "a an the this that these those each every either neither some any no all both half such what which "
    "my your his her its our their whose another",
    "preposition": "about above across after against along among around as at before behind below beneath beside "
    "between beyond by despite down during except for from in inside into like near of off on onto out outside over "
    "past per since through throughout till to toward towards under until up upon via with within without",
    "pronoun": "i you he she it we they me him us them myself yourself himself herself itself ourselves themselves "
    "mine yours hers ours theirs who whom someone somebody something anyone anybody anything everyone everybody "
    "everything nobody nothing none one",
    "conjunction": "and but or nor so yet if unless because although though while whereas when whenever where "
    "wherever whether than",
    "auxiliary": "am is are was were be been being have has had having do does did can could may might must shall "
    "should will would cannot",
}
LETTERS = "acst"  # begin a third of English words
_SUFFIXES = {"-ly": "ly", "-ing": "ing", "-ed": "ed"}
_LETTERS_BEFORE_SUFFIX = 2

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_BLANK_LINE = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?=\s|$)")

Span = tuple[int, int]


@dataclass
class TextTokens:
    """Consecutive tokens and their text.

    Args:
        text (`str`): Text of the tokens.
        spans (`list[tuple[int, int]]`): Begin and end of each token in the text, without the whitespace around it; a
            token of whitespace alone has a span of length 0.
        raw (`list[tuple[int, int]]`): Begin and end of each token with its whitespace.
        ids (`list[int]`): Token ids.
        positions (`list[int]`): Position of each token in the window.
        length (`int`): Number of tokens in the window, without padding.
    """

    text: str
    spans: list[Span]
    raw: list[Span]
    ids: list[int]
    positions: list[int]
    length: int


def property_names() -> list[str]:
    """Return the names of the properties, in the order of the labels."""
    return list(_PROPERTIES)


def property_labels(
    batch: TokenBatch, reader: "TokenReader", properties: Mapping[str, "Property"] | None = None
) -> Tensor:
    """Return which token has which property, `(B, S, T)` bool; padding and special tokens have none.

    Args:
        batch ([`TokenBatch`]): Windows of tokens.
        reader ([`TokenReader`]): Reader of the tokenizer's tokens.
        properties (`Mapping[str, Property]`, *optional*): Functions from a part to a bool for each of its tokens; by
            default those of [`property_names`].
    """
    properties = _PROPERTIES if properties is None else properties
    labels = torch.zeros(*batch.input_ids.shape, len(properties), dtype=torch.bool)
    for row, (ids, mask) in enumerate(zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)):
        for part in reader.parts(ids, mask):
            for number, of in enumerate(properties.values()):
                true = [position for position, value in zip(part.positions, of(part), strict=True) if value]
                labels[row, true, number] = True
    return labels


class TokenReader:
    """Joins the tokens of windows to text.

    Args:
        tokenizer: Any tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._special = tokenizer, set(tokenizer.all_special_ids)
        self._texts: dict[int, str] = {}

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Return the text of each token."""
        ids = list(ids)
        new = [token for token in dict.fromkeys(ids) if token not in self._texts]
        self._texts.update(zip(new, token_texts(self._tokenizer, new), strict=True))
        return [self._texts[token] for token in ids]

    def parts(self, ids: Sequence[int], mask: Sequence[int]) -> Iterator[TextTokens]:
        """Yield the pieces of text between special tokens and padding of a window.

        Args:
            ids (`Sequence[int]`): Token ids of the window.
            mask (`Sequence[int]`): 0 at padding.
        """
        length, positions = sum(mask), []
        for position in range(len(ids) + 1):
            if position < len(ids) and mask[position] and ids[position] not in self._special:
                positions.append(position)
            elif positions:
                yield self._part([ids[at] for at in positions], positions, length)
                positions = []

    def _part(self, ids: list[int], positions: list[int], length: int) -> TextTokens:
        texts, raw, spans, end = self.texts(ids), [], [], 0
        for text in texts:
            start, end = end, end + len(text)
            raw.append((start, end))
            begin = start + len(text) - len(text.lstrip())
            spans.append((begin, max(begin, start + len(text.rstrip()))))
        return TextTokens("".join(texts), spans, raw, ids, positions, length)


# Properties: functions from a part to a bool for each token


Property = Callable[[TextTokens], list[bool]]


def _says(pattern: str) -> Property:
    compiled = re.compile(pattern)
    return lambda part: [bool(compiled.search(part.text[start:end])) for start, end in part.raw]


def _spelled(pattern: str) -> Property:
    compiled = re.compile(pattern)
    return lambda part: [bool(compiled.fullmatch(part.text[start:end])) for start, end in part.spans]


def _last_tokens(true: Callable[[str], bool]) -> Property:
    """Return the property of tokens in which a word ends for which `true` holds."""
    return lambda part: _hold([word.end() - 1 for word in _WORD.finditer(part.text) if true(word[0])], part)


def _first_tokens(true: Callable[[str], bool]) -> Property:
    """Return the property of tokens in which a word begins for which `true` holds."""
    return lambda part: _hold([word.start() for word in _WORD.finditer(part.text) if true(word[0])], part)


def _hold(characters: Iterable[int], part: TextTokens) -> list[bool]:
    """Return which tokens hold one of these characters."""
    holds, ends = [False] * len(part.raw), [end for _, end in part.raw]
    for at in characters:
        holds[bisect_right(ends, at)] = True
    return holds


def _of_class(words: str) -> Property:
    lexicon = frozenset(words.split())
    return _last_tokens(lambda word: word.lower() in lexicon)


def _with_suffix(suffix: str) -> Property:
    least = len(suffix) + _LETTERS_BEFORE_SUFFIX
    return _last_tokens(lambda word: len(word) >= least and word.lower().endswith(suffix))


def _with_letter(letter: str) -> Property:
    return _first_tokens(lambda word: word[0].lower() == letter)


def _continues_word(part: TextTokens) -> list[bool]:
    """Return which tokens begin inside a word that began before them."""
    inside = {at for word in _WORD.finditer(part.text) for at in range(word.start() + 1, word.end())}
    return [start in inside for start, _ in part.raw]


def _follows_the(part: TextTokens) -> list[bool]:
    words = list(_WORD.finditer(part.text))
    return _hold([after.start() for before, after in pairwise(words) if before[0].lower() == "the"], part)


def _sentence_ends(part: TextTokens) -> list[int]:
    return [match.start() for match in _SENTENCE_END.finditer(part.text)]


def _begins_sentence(part: TextTokens) -> list[bool]:
    starts = sorted({end + 1 for end in _sentence_ends(part)} | {b.end() for b in _BLANK_LINE.finditer(part.text)})
    words = [word.start() for word in _WORD.finditer(part.text)]
    places = (bisect_right(words, start - 1) for start in starts)
    return _hold({words[place] for place in places if place < len(words)}, part)


def _inside(opens: str, closes: str, alike: str = "") -> Property:
    """Return the property of tokens that begin behind an opening sign that is not closed yet."""
    return lambda part: _are_inside(part, opens, closes, alike)


def _are_inside(part: TextTokens, opens: str, closes: str, alike: str) -> list[bool]:
    blank = {match.start() for match in _BLANK_LINE.finditer(part.text)}
    depth, quoted, inside = 0, False, []
    for at, character in enumerate(part.text):
        if at in blank:
            depth, quoted = 0, False
        depth = max(0, depth - (character in closes))
        # The signs that begin and end a quotation are not inside it.
        ends = quoted and character in alike
        quoted = quoted and not ends
        inside.append(depth > 0 or quoted)
        depth += character in opens
        quoted = quoted or (character in alike and not ends)
    return [start < end and inside[start] for start, end in part.spans]


def _seen_before(part: TextTokens) -> list[bool]:
    earlier, repeats = set(), []
    for token in part.ids:
        repeats.append(token in earlier)
        earlier.add(token)
    return repeats


_PROPERTIES: dict[str, Property] = {
    "digit": _says(r"\d"),
    "punctuation": _spelled(r"[^\w\s]+"),
    "line break": _says(r"\n"),
    "begins a word": _first_tokens(bool),  # no word is empty
    "continues a word": _continues_word,
    "ends a long word": _last_tokens(lambda word: len(word) >= 9),
    "capitalised": _first_tokens(lambda word: word[0].isupper() and not (len(word) > 1 and word.isupper())),
    "all capitals": _last_tokens(lambda word: len(word) > 1 and word.isupper()),
    "in double quotes": _inside("\u201c", "\u201d", '"'),
    "in brackets": _inside("([{", ")]}"),
    "begins a sentence": _begins_sentence,
    "ends a sentence": lambda part: _hold(_sentence_ends(part), part),
    "first quarter of the context": lambda part: [4 * position < part.length for position in part.positions],
    "last quarter of the context": lambda part: [4 * position >= 3 * part.length for position in part.positions],
    "seen before": _seen_before,
    "follows 'the'": _follows_the,
    **{name: _of_class(words) for name, words in WORD_CLASSES.items()},
    **{name: _with_suffix(suffix) for name, suffix in _SUFFIXES.items()},
    **{f"first letter {letter}": _with_letter(letter) for letter in LETTERS},
}


PARENTS: dict[str, Property] = {
    **{name: _PROPERTIES[name] for name in ("digit", "punctuation", "capitalised", "all capitals")},
    **{name: _PROPERTIES[name] for name in ("in double quotes", "in brackets")},
    "indentation": _says(r"(^|\n)[ \t]{2,}|\n[ \t]+"),
    "function word": _of_class(" ".join(WORD_CLASSES.values())),
}
"""Properties whose tokens are of many kinds: digits, marks, words. A latent of the whole has them as children."""
