"""Figures: one way to draw a metric over widths, one way to save; neither chooses a matplotlib backend."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any


Point = tuple[int | None, float, Sequence[float] | None]
"""Width, value, and the ends of the value's interval where it has one."""

DPI = 150
"""Pixels per inch of a saved figure."""

_SHAPES = "sD^vPX*p"


def draw_widths(
    axis: Any, lines: dict[str, list[Point]], flat: Sequence[str] = (), dashed: Sequence[str] = ()
) -> None:
    """Draw values against width with their intervals; the `n`th line has the colour `C<n>` on every axis.

    Args:
        axis (`Axes`): The matplotlib axes to draw on.
        lines (`dict[str, list[Point]]`): Points of each line, by its name.
        flat (`Sequence[str]`, *optional*): Names of lines of one width, which are drawn across.
        dashed (`Sequence[str]`, *optional*): Names of baselines that have every width.
    """
    for number, (name, points) in enumerate(lines.items()):
        style = {"color": f"C{number}", "label": name}
        if points and name in flat:
            _, value, bounds = points[-1]
            axis.axhline(value, linestyle=":", **style)
            if bounds is not None:
                axis.axhspan(*bounds, color=f"C{number}", alpha=0.06)
        elif points:
            widths, values, intervals = zip(*points, strict=True)
            spans = [bounds or (value, value) for value, bounds in zip(values, intervals, strict=True)]
            # The mean of resamples can lie on either side of an end of the interval by rounding.
            below = [max(0.0, value - low) for value, (low, _) in zip(values, spans, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(values, spans, strict=True)]
            style |= {"marker": "o", "markersize": 4, "linestyle": "--" if name in dashed else "-"}
            if len(points) == 1:  # a dot alone: large, hollow and of a shape of its own, so that none hides another
                style |= {"marker": _SHAPES[number % len(_SHAPES)], "markersize": 8, "markerfacecolor": "none"}
                style["markeredgewidth"] = 1.5
            if any(intervals):
                axis.errorbar(widths, values, yerr=[below, above], capsize=3, **style)
            else:  # no bars in the legend either
                axis.plot(widths, values, **style)
    label_widths(axis, {width for name, points in lines.items() if name not in flat for width, *_ in points})


def label_widths(axis: Any, widths: set[int]) -> None:
    """Make the x axis logarithmic, with a label at each of `widths` where they are few."""
    axis.set(xlabel="width (latents)", xscale="log")
    if 0 < len(widths) <= 12:
        ticks = sorted(widths)
        axis.set_xticks(ticks, list(map(str, ticks)), rotation=45 if len(ticks) > 8 else 0)
        axis.minorticks_off()
    axis.grid(alpha=0.3, which="both")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib `Figure`, which needs no backend and leaves a notebook's alone, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp" + path.suffix)
    figure.savefig(temporary, dpi=DPI)
    temporary.replace(path)


def figure_html(figure: Any) -> str:
    """A matplotlib `Figure` as HTML that holds its PNG, for notebooks."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'
