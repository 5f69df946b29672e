"""Intervals of figures over seeds."""

from collections.abc import Sequence
from statistics import mean, stdev


def seed_interval(values: Sequence[float]) -> list[float] | None:
    """The 95% interval of a mean over independent seeds, by Student's t; `None` of one seed."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    middle = mean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [middle - half, middle + half]
