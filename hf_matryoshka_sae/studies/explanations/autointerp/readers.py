"""What explains a latent and is then examined on the explanation: a judge, or N2G's patterns where there is none.

A reader is made from passages in which a latent is active and answers three kinds of questions about others. An answer
that is a refusal or malformed says nothing: "in none of them" or zeros. So does every answer where there is no
explanation; then nothing more is asked.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from ..n2g import HALF
from ..n2g_trie import HERE, START, WILDCARD, PatternTrie
from .answers import AnswerCache, Judge
from .contexts import Context, TokenTexts
from .parsing import choices, refuses, sentence, strengths
from .questions import Questions


STAND_IN = "no judge: N2G patterns stand in"
_SHOWN = 5
_SIGNS = {WILDCARD: "*", START: "^", HERE: "|"}
T = TypeVar("T")


class Reader(Protocol):
    """Explains one latent and answers from the explanation.

    Attributes:
        explanation (`str`): Empty where there is none.
        questions (`int`), refusals (`int`), malformed (`int`): How many were asked, refused, and answered in another
            form than asked for.
    """

    explanation: str
    questions: int
    refusals: int
    malformed: int

    def detect(self, contexts: Sequence[Context]) -> list[bool]:
        """In which passages the latent is active."""
        ...

    def check_marks(self, contexts: Sequence[Context], marks: Sequence[np.ndarray]) -> list[bool]:
        """In which passages the marked tokens are those on which it is active."""
        ...

    def simulate(self, context: Context) -> list[float]:
        """How active it is on each token; the scale is free."""
        ...


class JudgeReader:
    """A judge's explanation and answers.

    Args:
        judge ([`Judge`]): Answers questions.
        cache ([`AnswerCache`]): Through which it is asked.
        prompts ([`Questions`]): Templates.
        texts ([`TokenTexts`]): Of the language model's tokens.
        examples (`Sequence[Context]`): What the explanation is made from.
    """

    def __init__(
        self, judge: Judge, cache: AnswerCache, prompts: Questions, texts: TokenTexts, examples: Sequence[Context]
    ) -> None:
        self._judge, self._cache, self._prompts, self._texts = judge, cache, prompts, texts
        self.questions = self.refusals = self.malformed = 0
        passages = [f"- {texts.marked(one.ids, one.active)}" for one in examples]
        self.explanation = self._answer("explain", _explained, passages="\n".join(passages)) or ""

    def detect(self, contexts: Sequence[Context]) -> list[bool]:
        """Ask the judge in which contexts the latent fires."""
        return self._choose("detection", ["".join(self._texts.of(one.ids)) for one in contexts])

    def check_marks(self, contexts: Sequence[Context], marks: Sequence[np.ndarray]) -> list[bool]:
        """Ask the judge in which contexts the right tokens are marked."""
        marked = [self._texts.marked(one.ids, each) for one, each in zip(contexts, marks, strict=True)]
        return self._choose("fuzzing", marked)

    def simulate(self, context: Context) -> list[float]:
        """Ask the judge for the activation on each token of a context."""
        tokens = "\n".join(f"{number}: {text}" for number, text in enumerate(self._texts.of(context.ids), start=1))
        count = len(context.ids)
        answers = self._examined("simulation", lambda text: strengths(text, count), count=count, tokens=tokens)
        return [0.0] * count if answers is None else answers

    def _choose(self, name: str, passages: list[str]) -> list[bool]:
        count = len(passages)
        listed = "\n".join(f"{number}: {passage}" for number, passage in enumerate(passages, start=1))
        answers = self._examined(name, lambda text: choices(text, count), count=count, passages=listed)
        return [False] * count if answers is None else answers

    def _examined(self, name: str, parse: Callable[[str], T | None], **values: str | int) -> T | None:
        return self._answer(name, parse, explanation=self.explanation, **values) if self.explanation else None

    def _answer(self, name: str, parse: Callable[[str], T | None], **values: str | int) -> T | None:
        reply = self._cache.ask(self._judge, self._prompts.of(name, **values))
        self.questions += 1
        found = None if reply.refused else parse(reply.text)
        if found is None:
            refused = reply.refused or refuses(reply.text)
            self.refusals += refused
            self.malformed += not refused
        return found


def _explained(text: str) -> str | None:
    return None if refuses(text) else sentence(text)


class PatternReader:
    """Patterns of tokens in a judge's place.

    A passage is said to be active where a pattern ends in it, marks to be right where patterns end on at least half of
    the marked tokens, and activations to be what the patterns predict. Patterns see whole windows.

    Args:
        trie ([`PatternTrie`]): The latent's patterns.
        texts ([`TokenTexts`]): Of the language model's tokens.
        windows (`np.ndarray` of shape `(N, S)`): The text that passages are from.
    """

    def __init__(self, trie: PatternTrie, texts: TokenTexts, windows: np.ndarray) -> None:
        self._trie, self._windows = trie, windows
        self.questions = self.refusals = self.malformed = 0
        shown = [_written(pattern, texts) for pattern, _ in trie.items()[:_SHOWN]]
        more = f" and {trie.patterns - _SHOWN} more" if trie.patterns > _SHOWN else ""
        self.explanation = f"patterns {', '.join(shown)}{more}"

    def _predicted(self, context: Context) -> np.ndarray:
        # Not of the passage alone: a pattern may begin before it, and where the model sees ahead go on after it.
        return self._trie.predict(self._windows[context.row : context.row + 1])[0, context.start : context.stop]

    def detect(self, contexts: Sequence[Context]) -> list[bool]:
        """Return in which contexts a pattern matches."""
        return [bool((self._predicted(one) > 0).any()) for one in contexts]

    def check_marks(self, contexts: Sequence[Context], marks: Sequence[np.ndarray]) -> list[bool]:
        """Return in which contexts patterns match at half or more of the marked tokens."""
        pairs = zip(contexts, marks, strict=True)
        return [bool((self._predicted(one)[each] > 0).mean() >= HALF) for one, each in pairs]

    def simulate(self, context: Context) -> list[float]:
        """Return the activation that patterns predict on each token of a context."""
        return self._predicted(context).tolist()


def _written(pattern: list[int], texts: TokenTexts) -> str:
    """A pattern as text: tokens, * for any token, ^ for a context's start, | where it fires if more follows."""
    runs: list[list[int]] = [[]]
    written = ""
    for key in [*pattern, WILDCARD]:
        if key in _SIGNS:
            written += "".join(texts.of(tuple(runs[-1]))) if runs[-1] else ""
            written += _SIGNS[key]
            runs.append([])
        else:
            runs[-1].append(key)
    return repr(written[:-1])
