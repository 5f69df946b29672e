"""From answers to numbers; what says nothing scores as chance does, never as NaN."""

from collections.abc import Sequence

import numpy as np


def agreement(said: Sequence[bool], truth: Sequence[bool]) -> tuple[float, float, float]:
    """Balanced accuracy, F1 and accuracy of yes-or-no answers.

    Balanced accuracy is the mean of the share of true ones called true and of false ones called false; of a kind that
    does not occur that share counts as one half. Answers that are all the same have 0.5. F1 is 0 without a hit.

    Args:
        said (`Sequence[bool]`): Answers, at least one.
        truth (`Sequence[bool]`): Right answers, as many.
    """
    answers, right = np.asarray(said, dtype=bool), np.asarray(truth, dtype=bool)
    assert len(answers) == len(right) > 0
    shares = [float((answers[kind] == right[kind]).mean()) if kind.any() else 0.5 for kind in (right, ~right)]
    hits = int((answers & right).sum())
    f1 = 2 * hits / int(answers.sum() + right.sum()) if hits else 0.0
    return sum(shares) / 2, f1, float((answers == right).mean())


def pearson(predicted: np.ndarray, actual: np.ndarray) -> float | None:
    """Pearson's correlation of two sequences; None where either does not vary."""
    pair = [np.asarray(values, dtype=np.float64) for values in (predicted, actual)]
    centred = [values - values.mean() for values in pair]
    # Rounding leaves a constant sequence off its mean by no more than this.
    if any(np.abs(c).max() <= 1e-12 * np.abs(values).max() for c, values in zip(centred, pair, strict=True)):
        return None
    x, y = (values / np.linalg.norm(values) for values in centred)
    return float(np.clip(x @ y, -1, 1))
