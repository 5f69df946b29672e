"""Plot the laws of a sweep: loss against size, against compute, over size and k, and predicted against measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.figures import save_figure
from .points import Point, frontier


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from .laws import PowerLawWithFloor
    from .report import BudgetFits, ScalingReport


_HELD_OUT = dict(marker="s", markerfacecolor="none", linestyle="none", markersize=6)


def plot_scaling(report: "ScalingReport", path: str | Path) -> None:
    """Draw the laws of the largest budget, and L(C) over all budgets, to a PNG.

    Args:
        report ([`ScalingReport`]): Report with at least one law.
        path (`str` or `Path`): The PNG to write.
    """
    from matplotlib.figure import Figure

    largest = report.budgets[-1]
    points = [point for point in report.points if point.tokens == largest.tokens]
    colours = dict(zip(sorted({point.k for point in report.points}), _colours(report.points), strict=True))
    figure = Figure(figsize=(13, 10), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_sizes(axes[0, 0], points, largest, colours)
    _draw_compute(axes[0, 1], report, colours)
    _draw_surface(axes[1, 0], points, largest)
    _draw_predicted(axes[1, 1], report)
    trained = "" if largest.tokens is None else f" on {largest.tokens:,} tokens"
    figure.suptitle(f"Held-out loss of SAEs trained{trained}: scaling laws with 95% bands")
    save_figure(figure, Path(path))


def _colours(points: Sequence[Point]) -> list:
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.85, len({point.k for point in points}))))


def _draw_sizes(axis: "Axes", points: Sequence[Point], fits: "BudgetFits", colours: dict) -> None:
    for k, colour in colours.items():
        at_k = [point for point in points if point.k == k]
        _draw_points(axis, at_k, "num_latents", colour)
        if k in fits.sizes:
            law = fits.sizes[k]
            exponent, floor = law.constants["exponent"], law.constants["floor"]
            _draw_law(axis, law, _grid(at_k, "num_latents"), colour, f"k = {k}: $F^{{-{exponent:.2f}}}$ + {floor:.3f}")
        else:
            axis.plot([], [], "o", color=colour, markersize=4, label=f"k = {k}")
    axis.plot([], [], color="0.3", label="held out", **_HELD_OUT)
    axis.set(xscale="log", yscale="log", xlabel="latents F", ylabel="held-out FVU", title="L(F) at each k")
    _finish(axis)
    _label(axis.xaxis, {point.num_latents for point in points})


def _draw_compute(axis: "Axes", report: "ScalingReport", colours: dict) -> None:
    for k, colour in colours.items():
        at_k = [point for point in report.points if point.k == k and point.flops is not None]
        _draw_points(axis, at_k, "flops", colour, alpha=0.35)
        best = frontier(report.points, k)
        if not best:
            continue
        axis.plot([p.flops for p in best], [p.loss for p in best], "o", color=colour, markersize=5)
        if k in report.compute:
            law = report.compute[k]
            exponent, floor = law.constants["exponent"], law.constants["floor"]
            _draw_law(axis, law, _grid(best, "flops"), colour, f"k = {k}: $C^{{-{exponent:.2f}}}$ + {floor:.3f}")
    title = "L(C): full points are the efficient frontier at each k" if axis.lines else "L(C): compute is not known"
    axis.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel="held-out FVU", title=title)
    _finish(axis)


def _draw_surface(axis: "Axes", points: Sequence[Point], fits: "BudgetFits") -> None:
    axis.set(xscale="log", yscale="log", xlabel="latents F", ylabel="active latents k")
    if fits.joint is None:
        axis.set_title("L(F, k): not fitted")
        return
    from matplotlib.colors import LogNorm

    sizes, ks = _grid(points, "num_latents", 1.1), _grid(points, "k", 1.1)
    losses = fits.joint.predict(sizes[None], ks[:, None])
    levels = np.geomspace(losses.min(), losses.max(), 14)
    filled = axis.contourf(sizes, ks, losses, levels, norm=LogNorm(), cmap="viridis", alpha=0.75)
    axis.clabel(axis.contour(sizes, ks, losses, levels, colors="0.25", linewidths=0.6), fmt="%.3f", fontsize=7)
    for held_out in (False, True):
        chosen = [point for point in points if point.held_out == held_out]
        style = _HELD_OUT if held_out else dict(marker="o", linestyle="none", markersize=4)
        label = "held out" if held_out else "fitted"
        axis.plot([p.num_latents for p in chosen], [p.k for p in chosen], color="black", label=label, **style)
    axis.figure.colorbar(filled, ax=axis, label="fitted FVU", format="%.3f")
    error = f", {fits.held_out['joint']:.1%} held out" if "joint" in fits.held_out else ""
    axis.set_title(f"L(F, k): error {fits.joint.rmse:.1%} of the fitted points{error}")
    axis.legend(fontsize=8)
    _label(axis.xaxis, {point.num_latents for point in points})
    _label(axis.yaxis, {point.k for point in points})


def _draw_predicted(axis: "Axes", report: "ScalingReport") -> None:
    limits = [factor * bound([p.loss for p in report.points]) for factor, bound in ((0.95, min), (1.05, max))]
    axis.plot(limits, limits, color="0.6", linewidth=1)
    for i, fits in enumerate(report.budgets):
        for held_out in (False, True):
            chosen = [p for p in report.points if p.tokens == fits.tokens and p.held_out == held_out]
            if fits.joint is None or not chosen:
                continue
            predicted = fits.joint.predict([p.num_latents for p in chosen], [p.k for p in chosen])
            style = _HELD_OUT if held_out else dict(marker="o", linestyle="none", markersize=4)
            label = (f"{fits.tokens:,} tokens" if fits.tokens else "points") + ", held out" * held_out
            axis.plot([p.loss for p in chosen], predicted, color=f"C{i}", label=label, **style)
    axis.set(xscale="log", yscale="log", title="Predicted and measured")
    axis.set(xlabel="measured FVU", ylabel="FVU of L(F, k)")
    _finish(axis)


def _draw_points(axis: "Axes", points: Sequence[Point], column: str, colour: object, alpha: float = 1.0) -> None:
    for held_out, style in ((False, dict(marker="o", linestyle="none", markersize=4)), (True, _HELD_OUT)):
        chosen = [point for point in points if point.held_out == held_out]
        if chosen:
            axis.plot(
                [getattr(p, column) for p in chosen], [p.loss for p in chosen], color=colour, alpha=alpha, **style
            )


def _draw_law(axis: "Axes", law: "PowerLawWithFloor", grid: np.ndarray, colour: object, label: str) -> None:
    axis.plot(grid, law.predict(grid), color=colour, linewidth=1.3, label=label)
    if len(law.samples):
        axis.fill_between(grid, *law.band(grid), color=colour, alpha=0.15, linewidth=0)


def _grid(points: Sequence[Point], column: str, margin: float = 1.0) -> np.ndarray:
    values = [getattr(point, column) for point in points]
    return np.geomspace(min(values) / margin, max(values) * margin, 80)


def _label(axis: "Axis", values: set[int]) -> None:
    if len(values) <= 12:
        axis.set_ticks(sorted(values), [str(value) for value in sorted(values)])
        axis.set_ticks([], minor=True)


def _finish(axis: "Axes") -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    if not np.isfinite(axis.dataLim.minpos).all():
        return  # nothing is drawn
    axis.grid(alpha=0.3, which="both")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    for each in (axis.xaxis, axis.yaxis):
        low, high = each.get_view_interval()
        if high < 100 * low:  # hardly a decade: label in between too
            each.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
        each.set_major_formatter(StrMethodFormatter("{x:g}"))
        each.set_minor_formatter("")
