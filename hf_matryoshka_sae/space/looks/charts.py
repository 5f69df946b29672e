"""Charts as SVG: they take their colours from the page, light or dark, and their width from the screen.

Each says in words what it shows, for those who do not see it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 44
_MOST_TICKS = 7


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
    size: tuple[int, int] = (380, 250),
) -> str:
    """Lines through points, one for each series.

    Args:
        series (`dict[str, list[tuple[float, float]]]`): Points by name; a series without points is left out, and so
            are points that have no place: NaN, infinities, and what is not positive on a logarithmic axis.
        x ([`Axis`]): The horizontal axis.
        y ([`Axis`]): The vertical axis.
        marks (`Sequence[Mark]`, *optional*): Points to mark.
        size (`tuple[int, int]`, *optional*): Of the drawing; the page scales it.

    Returns:
        `str`: HTML: a figure. Names and labels are escaped.
    """

    def placed(a: float, b: float) -> bool:
        return all(math.isfinite(value) and (value > 0 or not axis.log) for value, axis in ((a, x), (b, y)))

    series = {name: sorted(point for point in points if placed(*point)) for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    marks = [mark for mark in marks if placed(mark.x, mark.y)]
    if not series:
        return '<p class="quiet">Nothing was measured yet.</p>'
    across = _Scale(x, [point[0] for points in series.values() for point in points], _LEFT, size[0] - _RIGHT)
    up = _Scale(y, [point[1] for points in series.values() for point in points], size[1] - _BOTTOM, _TOP)
    parts = [_frame(across, up, size)]
    for number, points in enumerate(series.values()):
        line = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
        dots = "".join(
            f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="2.6"><title>{_number(a)}: {_number(b)}</title></circle>'
            for a, b in points
        )
        parts.append(f'<g class="series s{number}"><polyline points="{line}"/>{dots}</g>')
    names = list(series)
    for mark in marks:
        a, b = across(mark.x), up(mark.y)
        side = ("end", -9) if a > size[0] * 0.62 else ("start", 9)
        parts.append(
            f'<g class="mark s{names.index(mark.series) if mark.series in names else 0}">'
            f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{_TOP}" y2="{size[1] - _BOTTOM}"/>'
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="6"/>'
            f'<text x="{a + side[1]:.1f}" y="{max(_TOP + 10, b - 9):.1f}" text-anchor="{side[0]}">'
            f"{escape(mark.text)}</text></g>"
        )
    said = "; ".join(_in_words(name, points) for name, points in series.items())
    said += "".join(f". {mark.text}" for mark in marks)
    legend = "" if len(series) < 2 else _legend(names)
    return _figure("".join(parts), size, f"{y.label} against {x.label}: {said}", legend)


def bar_chart(edges: Sequence[float], counts: Sequence[float], x: Axis, y: str, size: tuple[int, int]) -> str:
    """A histogram: counts between edges, on an axis that may be logarithmic."""
    if not len(counts) or max(counts) <= 0:
        return '<p class="quiet">It never fired.</p>'
    across = _Scale(x, list(edges), _LEFT, size[0] - _RIGHT)
    up = _Scale(Axis(y, low=0.0), [0.0, *counts], size[1] - _BOTTOM, _TOP)
    bars = "".join(
        f'<rect x="{across(left):.1f}" y="{up(count):.1f}" width="{max(1.0, across(right) - across(left) - 1):.1f}" '
        f'height="{up(0) - up(count):.1f}"><title>{_number(left)} to {_number(right)}: {count:,.0f}</title></rect>'
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )
    most = max(range(len(counts)), key=lambda i: counts[i])
    said = (
        f"{y} by {x.label}, from {_number(edges[0])} to {_number(edges[-1])}; most ({counts[most]:,.0f}) between "
        f"{_number(edges[most])} and {_number(edges[most + 1])}"
    )
    return _figure(f'{_frame(across, up, size)}<g class="bars s0">{bars}</g>', size, said)


class _Scale:
    """From values to places in the drawing, with its ticks."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, stop: float) -> None:
        self.axis, self.start, self.stop = axis, start, stop
        self.low = min(values) if axis.low is None else axis.low
        self.high = max(values) if axis.high is None else axis.high
        if self.high <= self.low:
            self.high = self.low * 2 if axis.log else self.low + 1

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.axis.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if self.axis.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= _MOST_TICKS:
                    break
            return ticks[:: -(-len(ticks) // _MOST_TICKS)] if ticks else [self.low, self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [tick * step for tick in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _frame(across: _Scale, up: _Scale, size: tuple[int, int]) -> str:
    """Axes, ticks and grid."""
    bottom, right = size[1] - _BOTTOM, size[0] - _RIGHT
    parts = []
    for tick in across.ticks():
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{_number(tick)}</text>')
    for tick in up.ticks():
        at = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" x="{(_LEFT + right) / 2}" y="{size[1] - 6}" text-anchor="middle">'
        f"{escape(across.axis.label)}</text>"
        f'<text class="label" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(up.axis.label)}</text>"
    )
    return "".join(parts)


def _figure(drawing: str, size: tuple[int, int], said: str, legend: str = "") -> str:
    return (
        f'<figure class="chart"><svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(said)}">'
        f"{drawing}</svg>{legend}</figure>"
    )


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<span class="s{number}">{escape(name)}</span>' for number, name in enumerate(names))
    return f"<figcaption>{items}</figcaption>"


def _in_words(name: str, points: Sequence[tuple[float, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{name} goes from {_number(start)} at {_number(first)} to {_number(end)} at {_number(last)}"


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-").replace(".0e", "e")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
