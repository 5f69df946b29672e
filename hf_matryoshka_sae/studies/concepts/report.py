"""SCR and TPP as people read them: a table, a plot, a JSON file, each with its warning."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.figures import save_figure
from ...common.files import write_json
from ..probing.report import Bootstrap


WARNING = (
    "An audit (arXiv 2605.18229) found that SCR and TPP fail several checks at canonical settings: do not rank SAEs "
    "by them."
)
HEADLINE = 20
_EXPLAINED = {
    "scr": "SCR: of the accuracy that a probe loses to a spurious attribute, the share that comes back where the N "
    "latents that speak most for that attribute are taken out. base: accuracy of the biased probe; clean: of a probe "
    "fitted to all combinations; keeps_first: share of splits in which the pair's first attribute was to be kept.",
    "tpp": "TPP: balanced accuracy that a class's probe loses where the N latents that speak most for the class are "
    "taken out, less what the probes of other classes lose on average.",
}


@dataclass
class ConceptRemoval:
    """What taking a few latents out does to probes.

    Args:
        rows (`list[dict]`): For each subject and width: `subject`, `kind` (`dictionary`, `random` or `neurons`),
            `width`, and by number of latents taken out (as `str`) `score`, `interval` (95%, bootstrap over splits and
            over pairs or classes) and `tasks`: the score of each pair or class by name.
        about (`dict`): `metric` (`scr` or `tpp`), `hookpoint`, `examples`, `selection`, `latents`, `splits`,
            `test_share`, `tasks` (accuracies with nothing taken out, by name), `skipped` (reasons by name), `seed`.
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]

    @classmethod
    def of_scores(
        cls,
        scores: Mapping[tuple[str, int], np.ndarray],
        kinds: Mapping[str, str],
        about: dict[str, Any],
        bootstrap: Bootstrap,
    ) -> "ConceptRemoval":
        """From scores `(S, T, K)` of each subject and width."""
        rows = []
        for (name, width), values in scores.items():
            row = {"subject": name, "kind": kinds[name], "width": width, "score": {}, "interval": {}, "tasks": {}}
            for number, count in enumerate(map(str, about["latents"])):
                of_count = values[:, :, number]
                row["score"][count] = float(of_count.mean())
                row["interval"][count] = bootstrap.interval(of_count)
                row["tasks"][count] = dict(zip(about["tasks"], of_count.mean(0).tolist(), strict=True))
            rows.append(row)
        return cls(rows, about)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {"warning": WARNING, "explanation": _EXPLAINED[self.about["metric"]], **self.about, "rows": self.rows}

    def __str__(self) -> str:
        about, counts = self.about, list(map(str, self.about["latents"]))
        (kind, examples), *_ = about["examples"].items()
        what = "pairs of attributes" if about["metric"] == "scr" else "classes"
        size = max(len(row["subject"]) for row in self.rows)
        lines = [
            f"{about['metric'].upper()} at {about['hookpoint']}: {len(about['tasks'])} {what}, {examples} {kind}, "
            f"{about['splits']} splits, selection {about['selection']}",
            f"warning: {WARNING}",
            f"{'':{size}} {'width':>6}" + "".join(f" {f'N = {count}':>8} {'95%':>14}" for count in counts),
        ]
        for row in self.rows:
            cells = (
                f" {row['score'][count]:>8.3f} {'{:.3f}..{:.3f}'.format(*row['interval'][count]):>14}"
                for count in counts
            )
            lines.append(f"{row['subject']:{size}} {row['width']:>6}" + "".join(cells))
        lines += [f"left out: {name} ({reason})" for name, reason in about["skipped"].items()]
        return "\n".join(lines)

    def save(self, folder: str | Path, name: str | None = None) -> None:
        """Write `<name>.json` and `<name>.png` into a folder; the name is by default that of the metric."""
        name = name or self.about["metric"]
        write_json(Path(folder) / f"{name}.json", self.to_dict())
        self.plot(Path(folder) / f"{name}.png")

    def plot(self, path: str | Path) -> None:
        """Draw the score against the number of latents at the widest width, and against width, to a PNG."""
        from matplotlib.figure import Figure

        counts, name = self.about["latents"], self.about["metric"].upper()
        headline = min(counts, key=lambda count: abs(count - HEADLINE))
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        by_count, by_width = figure.subplots(1, 2)
        for number, subject in enumerate(dict.fromkeys(row["subject"] for row in self.rows)):
            rows = [row for row in self.rows if row["subject"] == subject]
            style = {"color": f"C{number}", "marker": "o", "markersize": 4, "capsize": 3, "label": subject}
            wide = [(rows[-1]["score"][str(count)], rows[-1]["interval"][str(count)]) for count in counts]
            _draw(by_count, counts, wide, style)
            if rows[-1]["kind"] == "neurons":  # of one width
                by_width.axhline(rows[-1]["score"][str(headline)], color=f"C{number}", linestyle=":", label=subject)
            else:
                points = [(row["score"][str(headline)], row["interval"][str(headline)]) for row in rows]
                _draw(by_width, [row["width"] for row in rows], points, style)
        by_count.set(xlabel="latents taken out (widest width)", ylabel=name)
        by_width.set(xlabel="width (latents)", ylabel=f"{name} ({headline} latents taken out)")
        widths = sorted({row["width"] for row in self.rows if row["kind"] != "neurons"})
        for axis, ticks in ((by_count, counts), (by_width, widths)):
            axis.set_xscale("log")
            axis.grid(alpha=0.3, which="both")
            if len(ticks) <= 12:
                axis.set_xticks(ticks, list(map(str, ticks)), rotation=45 if len(ticks) > 8 else 0)
                axis.minorticks_off()
        by_count.legend(fontsize=8)
        figure.suptitle(WARNING, fontsize=9, color="tab:red")
        save_figure(figure, Path(path))


def _draw(axis: Any, xs: list[int], points: list[tuple[float, list[float]]], style: dict[str, Any]) -> None:
    # The mean of resamples can lie on either side of an end of the interval by rounding.
    below = [max(0.0, middle - low) for middle, (low, _) in points]
    above = [max(0.0, high - middle) for middle, (_, high) in points]
    axis.errorbar(xs, [middle for middle, _ in points], yerr=[below, above], **style)
