"""The report of doses: records, the useful range, a table and a plot."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.figures import figure_html, save_figure
from ..common.report import html_table, markdown_table, text_table


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_TITLES = ("", "factor", "relative dose", "cost (nats)", "wanted", "95%", "fires", "95%")
_KINDS = ("latent", "random", "plain", "prompt")


@dataclass(frozen=True)
class DoseReport:
    """What a steering does and costs against its dose; `str()` is its table.

    Args:
        records (`list[dict]`): For each `kind` (`plain`, `latent`, `random`, `prompt`) and `factor` the
            `relative_dose`, the `cost` in nats, and where text was sampled the shares `wanted` and `fires`, each with
            its 95% `_interval` over prompts.
        about (`dict`): Latents, wanted tokens, sizes, seed and `max_cost`.
        state_norm (`float`): Mean norm of the hidden states at the first hookpoint.
    """

    records: list[dict[str, Any]]
    about: dict[str, Any]
    state_norm: float

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one kind, smallest dose first."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def useful(self) -> list[dict[str, Any]]:
        """Return the latent's records within the cost whose effect is above the plain model's and the random one's.

        The effect is `wanted` or `fires`; its interval lies above the other two's means, and theirs below its mean.
        """
        plain = self.of("plain")[0]
        at_random = {record["factor"]: record for record in self.of("random")}
        return [
            record
            for record in self.of("latent")
            if record["cost"] is not None
            and record["cost"] <= self.about["max_cost"]
            and any(
                _above(record, other, name)
                for name in ("wanted", "fires")
                for other in [_highest(name, plain, at_random.get(record["factor"]))]
            )
        ]

    @property
    def summary(self) -> str:
        """Return a sentence that names the useful range of doses, or says that there is none."""
        if "wanted" not in self.of("plain")[0]:
            return "No text was sampled, so that nothing is known of the effect."
        if not self.useful:
            bound = self.about["max_cost"]
            return f"No dose within {bound} nats does more than the plain model and a random direction."
        first, last = self.useful[0], self.useful[-1]
        return (
            f"Useful: factors {first['factor']:.3g} to {last['factor']:.3g} (relative dose "
            f"{first['relative_dose']:.2g} to {last['relative_dose']:.2g}), at {last['cost']:.3g} nats for the last."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "records": self.records,
            "about": self.about,
            "state_norm": self.state_norm,
            "summary": self.summary,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "DoseReport":
        """Return the report that [`to_dict`] gave."""
        return cls(data["records"], data["about"], data["state_norm"])

    def _rows(self) -> list[list[str]]:
        records = sorted(self.records, key=lambda each: (_KINDS.index(each["kind"]), each["factor"]))
        return [
            [
                record["kind"],
                *(_cell(record.get(name), form) for name, form in (("factor", ".3g"), ("relative_dose", ".3f"))),
                _cell(record.get("cost"), "+.4f"),
                *(cell for name in ("wanted", "fires") for cell in _share(record, name)),
            ]
            for record in records
        ]

    @property
    def _words(self) -> list[str]:
        return [self.summary, f"Wanted: {self.about['wanted']}."]

    def __str__(self) -> str:
        return "\n".join([*text_table(_TITLES, self._rows()), *self._words])

    def markdown(self) -> str:
        """Return the table as Markdown, and the useful range."""
        return "\n\n".join([markdown_table(_TITLES, self._rows(), right=1), *self._words]) + "\n"

    def _repr_html_(self) -> str:
        """What a notebook shows: table and plot."""
        return html_table(_TITLES, self._rows()) + f"<p>{self.summary}</p>" + figure_html(self.figure())

    def plot(self, path: str | Path) -> None:
        """Write what [`figure`] draws to a PNG."""
        save_figure(self.figure(), Path(path))

    def figure(self) -> "Figure":
        """Draw cost and effects against the relative dose; bands are 95% intervals, the useful range is shaded."""
        from matplotlib.figure import Figure

        names = ["cost", *(name for name in ("wanted", "fires") if name in self.records[0])]
        titles = {"cost": "cost (nats a token)", "wanted": "share of wanted tokens", "fires": "share that fires"}
        figure = Figure(figsize=(4.6 * len(names), 3.8), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for number, kind in enumerate(("latent", "random")):
                records = self.of(kind)
                doses = [record["relative_dose"] for record in records]
                axis.plot(doses, [record[name] for record in records], "o-", color=f"C{number}", label=kind, ms=4)
                if name != "cost":
                    bounds = zip(*(record[f"{name}_interval"] for record in records), strict=True)
                    axis.fill_between(doses, *bounds, color=f"C{number}", alpha=0.15, linewidth=0)
            for kind, line in (("plain", ":"), ("prompt", "--")):
                if name != "cost" and self.of(kind):
                    axis.axhline(self.of(kind)[0][name], color="black", linestyle=line, linewidth=1, label=kind)
            if name == "cost":
                axis.axhline(self.about["max_cost"], color="tab:red", linestyle=":", linewidth=1, label="bound")
                axis.set_yscale("symlog", linthresh=self.about["max_cost"])
                axis.set_ylim(bottom=min(0.0, *(record[name] for record in self.of("latent") + self.of("random"))))
            if self.useful:
                axis.axvspan(*(self.useful[end]["relative_dose"] for end in (0, -1)), color="tab:green", alpha=0.08)
            axis.set(xlabel="relative dose", ylabel=titles[name])
            if len(self.of("latent")) > 1:
                axis.set_xscale("log")
            axis.grid(alpha=0.3)
        for axis in figure.axes[:2]:  # the bound, and the plain model, are each in one of them
            axis.legend(fontsize=8)
        return figure


def _highest(name: str, *records: dict[str, Any] | None) -> dict[str, Any] | None:
    return max(
        (each for each in records if each is not None and name in each), key=lambda each: each[name], default=None
    )


def _above(record: dict[str, Any], other: dict[str, Any] | None, name: str) -> bool:
    if other is None or name not in record:
        return False
    return record[f"{name}_interval"][0] > other[name] and other[f"{name}_interval"][1] < record[name]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(record: dict[str, Any], name: str) -> tuple[str, str]:
    if name not in record:
        return "-", "-"
    low, high = record[f"{name}_interval"]
    return f"{record[name]:.3f}", f"{low:.3f}..{high:.3f}"
