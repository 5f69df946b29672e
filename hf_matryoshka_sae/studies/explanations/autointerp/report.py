"""What the explanations of several dictionaries are worth, as numbers, a table and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....common.figures import save_figure
from ....common.files import write_json
from ...drawn_latents import NEURONS
from .examination import COUNTS, Interpreted


ABOUT = (
    "detection: balanced accuracy of telling passages in which the latent is active from others (0.5 says nothing), "
    "with F1 and accuracy; detection_all_no is the accuracy of answering none. fuzzing: balanced accuracy of telling "
    "right marks from wrong ones (0.5 says nothing). simulation: Pearson correlation of predicted and actual "
    "activations over a latent's joined passages, 0 where either is constant (counted). Refused and malformed answers "
    "are counted and score as having said nothing. Passages with ten tokens on either side, from other text than the "
    "explanations. Intervals: 95%, bootstrap over the drawn latents within groups."
)
_SAYS_NOTHING = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0}


@dataclass
class AutoInterp:
    """Scores of explanations, beside those of a random dictionary and of neurons.

    Args:
        rows (`dict[str, list[dict]]`): By name, for each width: `width`, `latents` (drawn), `explainable` (share of
            its latents that fire often enough in both texts), the scores, each one's interval, such as
            `fuzzing_interval`, and sums over the drawn latents of `questions`, `refusals`, `malformed`, `constant`
            and `crowded` (see [`Interpreted`]).
        latents (`dict[str, list[Interpreted]]`): The drawn latents of each.
        about (`dict`): Of the run: `judge`, `stand_in`, `scores`, `cost`, tokens, passages, seed.
    """

    rows: dict[str, list[dict[str, Any]]]
    latents: dict[str, list[Interpreted]]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "explanation": ABOUT,
            **self.about,
            "saes": self.rows,
            "latents": {name: [vars(one) for one in found] for name, found in self.latents.items()},
        }

    def save(self, folder: str | Path, name: str = "autointerp") -> None:
        """Write `<name>.json` and `<name>.png` into a folder."""
        write_json(Path(folder) / f"{name}.json", self.to_dict())
        self.plot(Path(folder) / f"{name}.png")

    @property
    def title(self) -> str:
        """Who explained and answered."""
        return f"{'' if self.about['stand_in'] else 'judge: '}{self.about['judge']}"

    def __str__(self) -> str:
        scores = self.about["scores"]
        lines = [f"{self.about['hookpoint']}: automated interpretability ({self.title})"]
        head = f"{'width':>8} {'drawn':>6} {'explainable':>12}" + "".join(f" {one:>10} {'95%':>13}" for one in scores)
        head += "".join(f" {one:>10}" for one in COUNTS)
        for name, rows in self.rows.items():
            lines += [f"  {name}", f"  {head}"]
            for row in rows:
                cells = "".join(f" {row[one]:>10.3f} {_interval(row[f'{one}_interval']):>13}" for one in scores)
                cells += "".join(f" {row[one]:>10d}" for one in COUNTS)
                lines.append(f"  {row['width']:>8d} {row['latents']:>6d} {row['explainable']:>12.1%}{cells}")
        if not self.about["stand_in"]:
            lines.append(_cost(self.about["cost"]))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw each score against width, with intervals, to a PNG."""
        from matplotlib.figure import Figure

        scores = self.about["scores"]
        figure = Figure(figsize=(4.5 * len(scores) + 1, 4.2), layout="constrained")
        for axis, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
            for name, rows in self.rows.items():
                _draw(axis, name, rows, score)
            axis.axhline(_SAYS_NOTHING[score], color="black", linewidth=0.8, linestyle="--", label="says nothing")
            axis.set(xlabel="width (latents)", ylabel=f"{score} (mean over latents)", xscale="log")
            axis.set_ylim(min(axis.get_ylim()[0], _SAYS_NOTHING[score] - 0.1), 1.02)
            axis.grid(alpha=0.3, which="both")
            widths = sorted({row["width"] for name, rows in self.rows.items() if name != NEURONS for row in rows})
            if len(widths) <= 12:
                axis.set_xticks(widths, [str(width) for width in widths])
                axis.minorticks_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8)
        figure.suptitle(f"Automated interpretability ({self.title})")
        save_figure(figure, Path(path))


def _draw(axis: Any, name: str, rows: Sequence[dict[str, Any]], score: str) -> None:
    if name == NEURONS:  # of one width
        axis.axhline(rows[-1][score], color="gray", linestyle=":", label=NEURONS)
        if rows[-1][f"{score}_interval"] is not None:
            axis.axhspan(*rows[-1][f"{score}_interval"], color="gray", alpha=0.12)
        return
    widths, middle = [row["width"] for row in rows], [row[score] for row in rows]
    bounds = [row[f"{score}_interval"] or (row[score], row[score]) for row in rows]
    below = [max(0.0, value - low) for value, (low, _) in zip(middle, bounds, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(middle, bounds, strict=True)]
    axis.errorbar(widths, middle, yerr=[below, above], marker="o", markersize=4, capsize=3, label=name)


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.3f} {bounds[1]:.3f}"


def _cost(cost: dict[str, Any]) -> str:
    line = (
        f"{cost['asked']} answers asked for, {cost['cached']} from the cache; {cost['prompt_tokens']:,} tokens read "
        f"and {cost['completion_tokens']:,} written in {cost['seconds']:.0f} s of the judge's time"
    )
    if cost["uncounted"]:
        line += f", those of {cost['uncounted']} answers not told"
    return line + (f"; {cost['money']:.2f} at the price given" if "money" in cost else "")
