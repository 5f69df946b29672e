"""What probing found, as people read it: a table, a plot, a JSON file; and how sure it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.figures import save_figure
from ...common.files import write_json
from .scores import ALL_CHANNELS, CHANNELS, Key, Scores
from .sparse import SCORES


NOTHING = "knows nothing"
_OF_ALL = "all"

ABOUT = (
    "probe_loss: cross-entropy, in nats on the test part, of a logistic regression on the single latent that predicts "
    "a task best on the train part (Gao et al. 2024, arXiv 2406.04093), as a mean over tasks and splits; each class "
    "weighs one half, so that knowing nothing is ln 2 = 0.693. train_loss: the same on the train part. gain: by how "
    "much the loss is below that of the best hidden-state channel. k_sparse: scikit-learn's logistic regression on "
    "the k latents whose class means differ most. Intervals: 95%, percentiles of a bootstrap over tasks and splits."
)


@dataclass
class Bootstrap:
    """Resamples of tasks and of splits, the same for everything they are applied to.

    Tasks count as independent, which those of one data set are not quite.

    Args:
        splits (`int`), tasks (`int`): Numbers of them.
        resamples (`int`, *optional*, defaults to 1000), seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """

    splits: int
    tasks: int
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self):
        random = np.random.default_rng(self.seed)
        self._weights = [
            random.multinomial(count, np.full(count, 1 / count), self.resamples) / count
            for count in (self.splits, self.tasks)
        ]

    def interval(self, values: np.ndarray) -> list[float]:
        """The middle 95% of the means of values `(splits, tasks)`, both resampled."""
        of_splits, of_tasks = self._weights
        means = ((of_splits @ values) * of_tasks).sum(1)
        return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


@dataclass
class ProbeReport:
    """What the latents of dictionaries and baselines tell about labels.

    Args:
        rows (`list[dict]`): One for each subject and width, JSON-able; see [`probe_losses`] for the keys.
        about (`dict`): `tasks` (names), `skipped` (reasons by name), `examples`, `splits`, `test_share`, `ridge`,
            `hookpoint`, `selection`, `k` and `notes`.
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]

    def subject(self, name: str) -> list[dict[str, Any]]:
        """The rows of one subject, narrowest first.

        Raises:
            `ValueError`: if there is no such subject.
        """
        found = [row for row in self.rows if row["subject"] == name]
        if not found:
            names = ", ".join(f"'{name}'" for name in dict.fromkeys(row["subject"] for row in self.rows))
            raise ValueError(f"No subject is called '{name}'; there are {names}.")
        return found

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A line for each subject and width."""
        about = self.about
        lines = [
            f"{about['hookpoint']}: {len(about['tasks'])} tasks, "
            + ", ".join(f"{count} {kind}" for kind, count in about["examples"].items())
            + f", {about['splits']} splits, test share {about['test_share']:g}, selection {about['selection']}"
        ]
        size = max(len(row["subject"]) for row in self.rows)
        titles = "".join(f" {f'acc k={k}':>8}" for k in about["k"]) + f" {'acc all':>8}"
        lines.append(f"{'':{size}} {'width':>6} {'probe loss':>10} {'95%':>15} {'gain':>7} {'95%':>16}{titles}")
        for row in self.rows:
            accuracies = [row["k_sparse"].get(str(k), {}).get("accuracy") for k in [*about["k"], _OF_ALL]]
            scores = "".join(f" {_number(accuracy):>8}" for accuracy in accuracies)
            gain, bounds = "-", "-"
            if row["gain"] is not None:
                gain, bounds = f"{row['gain']:.4f}", _interval(row["gain_interval"])
            lines.append(
                f"{row['subject']:{size}} {row['width'] or '-':>6} {row['probe_loss']:>10.4f} "
                f"{_interval(row['probe_loss_interval']):>15} {gain:>7} {bounds:>16}{scores}"
            )
        lines += [f"left out: {name} ({reason})" for name, reason in about["skipped"].items()]
        return "\n".join([*lines, *about["notes"]])

    def save(self, folder: str | Path, name: str = "probing") -> None:
        """Write `<name>.json` and `<name>.png` into a folder."""
        write_json(Path(folder) / f"{name}.json", {"explanation": ABOUT, **self.about, "rows": self.rows})
        self.plot(Path(folder) / f"{name}.png")

    def plot(self, path: str | Path) -> None:
        """Draw probe loss against width to a PNG, baselines as lines, and accuracies of k-sparse probes beside it."""
        from matplotlib.figure import Figure

        ks = self.about["k"]
        figure = Figure(figsize=(11 if ks else 6, 4.4), layout="constrained")
        axes = figure.subplots(1, 2 if ks else 1)
        axes = np.atleast_1d(axes)
        _draw(axes[0], self.rows, lambda row: (row["probe_loss"], row["probe_loss_interval"]))
        axes[0].set_ylabel("probe loss (nats, test part)")
        if ks:
            middle = str(ks[len(ks) // 2])
            _draw(
                axes[1],
                [row for row in self.rows if middle in row["k_sparse"]],
                lambda row: (row["k_sparse"][middle]["accuracy"], row["k_sparse"][middle]["accuracy_interval"]),
            )
            axes[1].set_ylabel(f"balanced accuracy, {middle} latents")
        axes[0].legend(fontsize=8)
        figure.suptitle(f"What single latents tell: {len(self.about['tasks'])} tasks")
        save_figure(figure, Path(path))


def _draw(axis: Any, rows: Sequence[dict[str, Any]], value: Any) -> None:
    widths = sorted({row["width"] for row in rows if row["kind"] in ("dictionary", "random")})
    for number, name in enumerate(dict.fromkeys(row["subject"] for row in rows)):
        of_name = [row for row in rows if row["subject"] == name]
        heights = [value(row)[0] for row in of_name]
        if of_name[0]["kind"] in ("dictionary", "random"):
            xs = [row["width"] for row in of_name]
            low, high = zip(*(value(row)[1] for row in of_name), strict=True)
            axis.fill_between(xs, low, high, alpha=0.12, color=f"C{number}")
            axis.plot(xs, heights, marker="o", markersize=4, color=f"C{number}", label=name)
        else:
            axis.axhline(heights[0], linestyle="--", color=f"C{number}", label=name)
    axis.set(xlabel="width (latents)", xscale="log")
    axis.grid(alpha=0.3, which="both")
    if 0 < len(widths) <= 12:
        axis.set_xticks(widths, [str(width) for width in widths], rotation=45 if len(widths) > 8 else 0)
        axis.minorticks_off()


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.3f}..{bounds[1]:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# From scores to rows


def report_rows(
    parts: Sequence[dict[Key, Scores]],
    kinds: Mapping[str, str],
    ks: Sequence[int],
    names: Sequence[str],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """A row for each subject and width, over the tasks of all parts."""
    kinds = {**kinds, CHANNELS: "channels", ALL_CHANNELS: "all channels"}
    joined = {key: _joined([part[key] for part in parts]) for key in parts[0]}
    channels = next((found["loss"] for (name, _), found in joined.items() if name == CHANNELS), None)
    rows = [
        {"subject": name, "kind": kinds[name], "width": width, **_row(found, channels, ks, names, bootstrap)}
        for (name, width), found in joined.items()
    ]
    if channels is not None:
        nothing = {"loss": np.full_like(channels, np.log(2)), "train_loss": np.full_like(channels, np.log(2))}
        rows.append(
            {"subject": NOTHING, "kind": "nothing", "width": None, **_row(nothing, channels, ks, names, bootstrap)}
        )
    return rows


def _joined(found: Sequence[Scores]) -> dict[str, np.ndarray]:
    """The tasks of several sets of examples side by side."""
    joined = {}
    for name in ("loss", "train_loss", "latents", "k_sparse"):
        tensors = [torch.stack(values) for each in found if (values := getattr(each, name))]
        if tensors:
            joined[name] = torch.cat(tensors, dim=2 if name == "k_sparse" else 1).numpy()
    return joined


def _row(
    found: dict[str, np.ndarray],
    channels: np.ndarray | None,
    ks: Sequence[int],
    names: Sequence[str],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    loss = found["loss"]
    row = {
        "probe_loss": float(loss.mean()),
        "probe_loss_interval": bootstrap.interval(loss),
        "train_loss": float(found["train_loss"].mean()),
        "gain": None if channels is None else float((channels - loss).mean()),
        "gain_interval": None if channels is None else bootstrap.interval(channels - loss),
    }
    tasks = {
        name: {"loss": float(loss[:, t].mean()), "train_loss": float(found["train_loss"][:, t].mean())}
        for t, name in enumerate(names)
    }
    if "latents" in found:
        for t, name in enumerate(names):
            tasks[name]["latents"] = found["latents"][:, t].tolist()
    row["k_sparse"] = {}
    if "k_sparse" in found:
        scores = found["k_sparse"]
        # All channels together are one probe, of as many inputs as there are.
        for number, k in enumerate(ks if "latents" in found else [_OF_ALL]):
            row["k_sparse"][str(k)] = {}
            for s, score in enumerate(SCORES):
                values = scores[:, number, :, s]
                row["k_sparse"][str(k)][score] = float(values.mean())
                row["k_sparse"][str(k)][f"{score}_interval"] = bootstrap.interval(values)
            for t, name in enumerate(names):
                of_task = {score: float(scores[:, number, t, s].mean()) for s, score in enumerate(SCORES)}
                tasks[name].setdefault("k_sparse", {})[str(k)] = of_task
    return {**row, "tasks": tasks}
