"""Importance against rank on logarithmic axes, with the fitted power laws: a panel per statistic."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..common.figures import save_figure
from .power_law import PowerLawFit, flat


if TYPE_CHECKING:
    from matplotlib.axes import Axes


_WORDS = {
    "power law": "consistent with a power law",
    "log-normal": "no power law: log-normal fits better",
    "exponential": "no power law: exponential fits better",
    "none": "no power law, log-normal or exponential",
    "undecided": "power law or exponential: undecided",
}


def plot_power_laws(fits: Mapping[str, tuple[Tensor | np.ndarray, PowerLawFit]], path: str | Path) -> None:
    """Draw importance against rank with its power law, a panel per statistic, to a PNG.

    The solid line is the maximum-likelihood law, drawn over the tail it is about; the dashed one is the least-squares
    line over its ranks.

    Args:
        fits (`Mapping[str, tuple[Tensor, PowerLawFit]]`): For each statistic's name its values, `[F]`, and their fit.
        path (`str` or `Path`): The PNG to write.

    Raises:
        `ValueError`: if `fits` is empty.
    """
    if not fits:
        raise ValueError("There are no fits to draw: `fits` is empty.")
    from matplotlib.figure import Figure

    columns = 2 if len(fits) == 4 else min(3, len(fits))
    rows = -(-len(fits) // columns)
    size = (5.2 * columns, 4.4 * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (name, (importance, fit)) in zip(axes.flat, fits.items(), strict=False):
        _draw(axis, name, flat(importance), fit)
    for axis in axes.flat[len(fits) :]:
        axis.set_axis_off()
    figure.suptitle("Importance by rank: maximum-likelihood power laws with 95% intervals")
    save_figure(figure, Path(path))


def _draw(axis: "Axes", name: str, values: np.ndarray, fit: PowerLawFit) -> None:
    ordered = np.sort(values[values > 0])[::-1]
    axis.loglog(np.arange(1, len(ordered) + 1), ordered, ".", color="0.6", markersize=3, label=_counts(fit))
    tail = np.array([1, fit.tail])
    low, high = fit.rank_exponent_interval
    label = f"$r^{{-s}}$, s = {fit.rank_exponent:.2f} [{low:.2f}, {high:.2f}], top {fit.tail}"
    if fit.p_value is not None:
        label += f" (p = {fit.p_value:.2f})"
    axis.loglog(tail, fit.minimum * (fit.tail / tail) ** fit.rank_exponent, color="C0", linewidth=1.8, label=label)
    line = fit.least_squares
    ranks = np.array(line.ranks)
    logs = np.log(ordered[ranks[0] - 1 : ranks[1]])
    centre = np.log(np.arange(ranks[0], ranks[1] + 1)).mean()
    label = f"least squares, s = {line.exponent:.2f}, R² = {line.r2:.2f}"
    fitted = np.exp(logs.mean() - line.exponent * (np.log(ranks) - centre))
    axis.loglog(ranks, fitted, "--", color="C1", linewidth=1.2, label=label)
    axis.set(xlabel="rank", ylabel=name)
    axis.set_title(f"{name}\n{_WORDS[fit.verdict]}", fontsize=10)
    # A least-squares line through a bend leaves the values far behind: they set the limits.
    axis.set_ylim(ordered[-1] / 2, ordered[0] * 4)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")


def _counts(fit: PowerLawFit) -> str:
    zeros = f", {fit.zeros} zeros left out" if fit.zeros else ""
    return f"{fit.values - fit.zeros} values{zeros}"
