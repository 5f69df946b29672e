"""Intervals of figures: Student's t over seeds, and percentiles of bootstraps; the same seed, the same numbers."""

from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np


def seed_interval(values: Sequence[float]) -> list[float] | None:
    """Return the 95% interval of a mean over independent seeds, by Student's t; `None` of one seed."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    middle = mean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [middle - half, middle + half]


def middle_95(samples: np.ndarray) -> list:
    """Return the 2.5th and the 97.5th percentile of resamples `(R, ...)`: two numbers, or a pair for each figure."""
    return np.quantile(samples, [0.025, 0.975], axis=0).T.tolist()


def resampled_rows(count: int, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Return numbers of rows drawn with replacement, `(resamples, count)`."""
    return random.integers(count, size=(resamples, count))


def resampled_means(table: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Return the mean of each resample of a table's rows `(N, S)`, `(resamples, S)`; 0 of no rows."""
    if not len(table):
        return np.zeros((resamples, table.shape[1]))
    return table[resampled_rows(len(table), resamples, random)].mean(1)


def resampled_counts(count: int, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Return how often each of `count` items is drawn in each resample, `(resamples, count)`."""
    return random.multinomial(count, np.full(count, 1 / count), resamples)


def ratio_interval(values: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> list[float]:
    """Return the 95% interval of sum of values / sum of weights, both `(N,)`, over resamples of [`resampled_rows`]."""
    totals = weights[rows].sum(1)
    return middle_95(values[rows].sum(1)[totals > 0] / totals[totals > 0])


class CrossedBootstrap:
    """Resamples of two crossed factors, such as splits and tasks; the same for each table they are applied to.

    Tasks count as independent, which those of one data set are not quite.

    Args:
        counts (`int`): Number of levels of the first and the second factor.
        resamples (`int`, *optional*, defaults to 1000): Number of resamples.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.
    """

    def __init__(self, *counts: int, resamples: int = 1000, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self._weights = [resampled_counts(n, resamples, random) / n for n in counts]

    def interval(self, values: np.ndarray) -> list[float]:
        """Return the middle 95% of the means of values `(first, second)`, both factors resampled."""
        first, second = self._weights
        return middle_95(((first @ values) * second).sum(1))
