"""A plan as a picture: what each layout holds and how long it takes."""

from pathlib import Path
from typing import Any

from ..common.figures import save_figure
from .plan import Plan
from .report import SMALL


def plot(plan: Plan, path: str | Path) -> None:
    """Draw each layout's memory by part beside the device's, and its time by part, to a PNG.

    Args:
        plan ([`Plan`]): The plan to draw.
        path (`str` or `Path`): The PNG to write.
    """
    from matplotlib.figure import Figure

    names = [str(layout.mesh) for layout in plan.layouts]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    (left, right) = figure.subplots(1, 2)
    _stack(left, names, [{name: size / 1e9 for name, size in layout.memory.parts.items()} for layout in plan.layouts])
    left.axhline(plan.device.memory / 1e9, color="black", label=f"{plan.device.name}")
    left.axhline(plan.device.usable / 1e9, color="black", linestyle=":", label="of which usable")
    peaks = [layout.memory.peak / 1e9 for layout in plan.layouts]
    # Layouts far from fitting would flatten the others.
    top = min(1.15 * max(*peaks, plan.device.memory / 1e9), 5 * plan.device.memory / 1e9)
    left.set_ylim(0, top)
    for name, peak in zip(names, peaks, strict=True):
        left.text(name, min(peak, 0.95 * top), f"{peak:.4g}", ha="center", va="bottom")
    left.set(xlabel="replicas x shards", ylabel="GB per device at the peak", title="Memory")
    times = [
        {part.name: part.seconds(plan.device) for part in layout.compute}
        | {f"send: {move.name}": move.seconds for move in layout.traffic}
        for layout in plan.layouts
    ]
    _stack(right, names, times)
    right.set(xlabel="replicas x shards", ylabel="seconds", title="A step (nothing overlaps)")
    for axis in (left, right):
        axis.legend(fontsize=7)
    save_figure(figure, Path(path))


def _stack(axis: Any, names: list[str], bars: list[dict[str, float]]) -> None:
    from matplotlib import colormaps

    parts = list(dict.fromkeys(name for bar in bars for name, size in bar.items() if size > SMALL * sum(bar.values())))
    below = [0.0] * len(bars)
    for number, part in enumerate(parts):
        sizes = [bar.get(part, 0.0) for bar in bars]
        axis.bar(names, sizes, bottom=below, label=part, color=colormaps["tab20"](number % 20))
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    rest = [sum(bar.values()) - size for bar, size in zip(bars, below, strict=True)]
    axis.bar(names, rest, bottom=below, label="the rest", color="lightgrey")
