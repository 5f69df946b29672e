"""One latent examined: from passages and a reader's answers to its scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .contexts import LatentContexts, wrong_marks
from .readers import Reader
from .scores import agreement, pearson


SCORES = {
    "detection": ("detection", "detection_f1", "detection_accuracy", "detection_all_no"),
    "fuzzing": ("fuzzing",),
    "simulation": ("simulation",),
}
"""Of each kind of question the numbers, the one it is named after first."""


_FIRINGS_A_PASSAGE, _MOST_SPREAD = 50, 5


@dataclass(frozen=True)
class PassageCounts:
    """How many passages of a latent are shown; SAEBench's where it has them.

    Args:
        examples_top (`int`, *optional*, defaults to 10), examples_spread (`int`, *optional*, defaults to 5): To
            explain from: around the strongest activations, and drawn evenly over the ranks of all; of the latter one
            more for every 50 firings, up to five times as many, as what fires often is not explained by few examples.
        top (`int`, *optional*, defaults to 2), weighted (`int`, *optional*, defaults to 2): The same, to tell from
            others.
        silent (`int`, *optional*, defaults to 10): Others, in which it is not active.
        fuzzed (`int`, *optional*, defaults to 10): With marks, half of them right.

    Raises:
        `ValueError`: for numbers below 1, or fewer `fuzzed` than 2 or than `top`.
    """

    examples_top: int = 10
    examples_spread: int = 5
    top: int = 2
    weighted: int = 2
    silent: int = 10
    fuzzed: int = 10

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1 or self.fuzzed < max(2, self.top):
            raise ValueError(f"Passages must number at least 1, and `fuzzed` at least 2 and `top`; got {self}.")

    def spread(self, fired: int) -> int:
        """Return how many passages over the whole range explain a latent that fires so many times."""
        return min(_MOST_SPREAD * self.examples_spread, self.examples_spread + fired // _FIRINGS_A_PASSAGE)

    @property
    def firing(self) -> int:
        """Passages in which it is active, of those to tell apart."""
        return self.top + self.weighted


@dataclass(frozen=True)
class Interpreted:
    """A latent, its explanation and what that is worth.

    Args:
        latent (`int`): Its place in the dictionary.
        explanation (`str`): Empty where the judge gave none.
        scores (`dict[str, float]`): By the names in `SCORES`.
        questions (`int`), refusals (`int`), malformed (`int`): Asked of the judge, refused, and answered in another
            form than asked for; the latter two count as having said nothing.
        constant (`int`): 1 where simulated or actual activations do not vary, so that the correlation counts as 0.
        crowded (`int`): 1 where fewer passages without it exist than asked for; those where it is weakest fill up.
        frequency (`float`): Share of the test text's tokens on which it fires.
    """

    latent: int
    explanation: str
    scores: dict[str, float]
    questions: int
    refusals: int
    malformed: int
    constant: int
    crowded: int
    frequency: float = 0.0


COUNTS = ("questions", "refusals", "malformed", "constant", "crowded")


def examine(
    latent: int,
    reader: Reader,
    test: LatentContexts,
    scores: Sequence[str],
    counts: PassageCounts,
    generator: np.random.Generator,
) -> Interpreted:
    """Ask a reader about passages of other text.

    Args:
        latent (`int`): Which one.
        reader ([`Reader`]): Has explained it.
        test ([`LatentContexts`]): Its passages in text that the explanation is not made from.
        scores (`Sequence[str]`): Of `SCORES`.
        counts ([`PassageCounts`]): How many passages.
        generator (`np.random.Generator`): Of what is drawn; the same draws whatever `scores` are.
    """
    firing = test.firing(counts.top, max(counts.weighted, counts.fuzzed - counts.top), generator)
    silent, enough = test.silent(counts.silent, generator)
    labelled = [(one, True) for one in firing[: counts.firing]] + [(one, False) for one in silent]
    passages, truth = zip(*_shuffled(labelled, generator), strict=True)

    marked = []
    for number, one in enumerate(_shuffled(firing[: counts.fuzzed], generator)):
        right = number % 2 == 0
        marks = one.active if right else wrong_marks(one, generator)
        if marks is not None:
            marked.append((one, marks, right))
    marked = _shuffled(marked, generator)

    results, constant = {}, 0
    if "detection" in scores:
        results |= zip(SCORES["detection"], agreement(reader.detect(passages), truth), strict=False)
        results["detection_all_no"] = 1 - sum(truth) / len(truth)
    if "fuzzing" in scores:
        shown, marks, right = zip(*marked, strict=True) if marked else ((), (), ())
        results["fuzzing"] = agreement(reader.check_marks(shown, marks), right)[0] if marked else 0.5
    if "simulation" in scores:
        predicted = np.concatenate([reader.simulate(one) for one in passages])
        correlation = pearson(predicted, np.concatenate([one.values for one in passages]))
        constant = int(correlation is None)
        results["simulation"] = correlation or 0.0
    return Interpreted(
        latent,
        reader.explanation,
        results,
        reader.questions,
        reader.refusals,
        reader.malformed,
        constant,
        crowded=int(not enough),
    )


def _shuffled(items: Sequence, generator: np.random.Generator) -> list:
    return [items[place] for place in generator.permutation(len(items))]
