"""Figures: one way to draw a metric over widths, one way to save."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_widths(axis: Any, rows: dict[str, list[dict[str, Any]]], key: str, flat: Sequence[str] = ()) -> None:
    """Draw `key` of each row against its width, with its `_interval` where it has one; those of one width as a line.

    Args:
        axis (`Axes`): Of matplotlib.
        rows (`dict[str, list[dict]]`): By name.
        key (`str`): Such as `"f1"`.
        flat (`Sequence[str]`, *optional*): Names of what has but one width, and is drawn across.
    """
    for name, found in rows.items():
        found = [row for row in found if row.get(key) is not None]
        if not found:
            continue
        if name in flat:
            axis.axhline(found[-1][key], color="gray", linestyle=":", label=name)
            continue
        middle = [row[key] for row in found]
        spans = [row.get(f"{key}_interval") or (row[key], row[key]) for row in found]
        below = [max(0.0, value - low) for value, (low, _) in zip(middle, spans, strict=True)]
        above = [max(0.0, high - value) for value, (_, high) in zip(middle, spans, strict=True)]
        widths = [row["width"] for row in found]
        axis.errorbar(widths, middle, yerr=[below, above], marker="o", markersize=4, capsize=3, label=name)
    axis.set(xlabel="width (latents)", xscale="log")
    widths = sorted({row["width"] for name, found in rows.items() if name not in flat for row in found})
    if len(widths) <= 12:
        axis.set_xticks(widths, list(map(str, widths)), rotation=45 if len(widths) > 8 else 0)
        axis.minorticks_off()
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib `Figure`, which needs no backend and leaves a notebook's alone, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp" + path.suffix)
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
