"""Charts: what they show, as data for the page's script, which draws it, and in words, for those who do not see it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Args:
        label (`str`): With the unit.
        log (`bool`, *optional*, defaults to `False`): Logarithmic; values must be positive.
        low (`float`, *optional*), high (`float`, *optional*): Its ends; by default those of the data.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """A point of a series that is marked, and the label beside it."""

    series: str
    x: float
    y: float
    text: str


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: Axis,
    y: Axis,
    marks: Sequence[Mark] = (),
    prefixes: Sequence[int] = (),
) -> str:
    """Return lines through points, one for each series, as HTML.

    Args:
        series (`dict[str, list[tuple[float, float]]]`): Points by name; a series without points is left out, and so
            are points that have no place: NaN, infinities, and what is not positive on a logarithmic axis.
        x ([`Axis`]): The horizontal axis.
        y ([`Axis`]): The vertical axis.
        marks (`Sequence[Mark]`, *optional*): Points to mark.
        prefixes (`Sequence[int]`, *optional*): Prefix widths, drawn as vertical lines.
    """

    def placed(a: float, b: float) -> bool:
        return all(math.isfinite(value) and (value > 0 or not axis.log) for value, axis in ((a, x), (b, y)))

    series = {name: sorted(point for point in points if placed(*point)) for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return '<p class="quiet">Nothing was measured yet.</p>'
    names = list(series)
    drawn = [mark for mark in marks if placed(mark.x, mark.y)]
    said = "; ".join(_in_words(name, points) for name, points in series.items())
    said += "".join(f". {mark.text}" for mark in drawn)
    return _chart(
        f"{y.label} against {x.label}: {said}",
        x=asdict(x),
        y=asdict(y),
        series=[{"name": name, "points": points} for name, points in series.items()],
        marks=[
            {"x": mark.x, "y": mark.y, "text": mark.text, "series": names.index(mark.series)}
            for mark in drawn
            if mark.series in names
        ],
        prefixes=list(prefixes),
    )


def _chart(said: str, **spec: Any) -> str:
    data = escape(json.dumps(spec), quote=True)
    return f'<nested-chart role="img" aria-label="{escape(said, quote=True)}" data-spec="{data}"></nested-chart>'


def _in_words(name: str, points: Sequence[tuple[float, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    line = f"from {_number(start)} at {_number(first)} to {_number(end)} at {_number(last)}"
    return f"{name} goes {line}" if name else line


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-").replace(".0e", "e")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
