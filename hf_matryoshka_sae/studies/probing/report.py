"""The report of probing, with confidence intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...common.intervals import CrossedBootstrap
from ...common.report import Column, Report
from ..drawn_latents import kind_of
from .scores import ALL_CHANNELS, CHANNELS, Key, Scores
from .sparse import SCORES


NOTHING = "knows nothing"
_OF_ALL = "all"

_COLUMNS = (
    Column(
        "probe_loss",
        "probe loss",
        "cross-entropy, in nats on the test part, of a logistic regression on the single latent that predicts a task "
        "best on the train part (Gao et al. 2024, arXiv 2406.04093), as a mean over tasks and splits; each class "
        "weighs one half, so that a probe that knows nothing has ln 2 = 0.693.",
        ".4f",
        "lower",
    ),
    Column("train_loss", "train loss", "probe loss on the train part.", table="nothing"),
    Column("gain", "gain", "probe loss of the best hidden-state channel less that of the subject.", ".4f", "higher"),
)
_INTERVALS = "Intervals: 95%, percentiles of a bootstrap over tasks and splits."


def probe_report(records: list[dict[str, Any]], about: dict[str, Any]) -> Report:
    """Return the report of records.

    Args:
        records (`list[dict]`): Records of [`probe_records`].
        about (`dict`): Settings and tasks of the measurement.
    """
    columns, ks = list(_COLUMNS), about["k"]
    for k in [*ks, _OF_ALL]:
        title, inputs = ("acc all", "all channels") if k == _OF_ALL else (f"acc k={k}", f"{k} latents")
        meaning, path = f"balanced accuracy of a logistic regression on {inputs}.", f"k_sparse.{k}.accuracy"
        columns.append(Column(f"accuracy_{k}", title, meaning, ".3f", "higher", path=path, table="value"))
    examples = ", ".join(f"{count} {kind}" for kind, count in about["examples"].items())
    title = (
        f"{about['hookpoint']}: {len(about['tasks'])} tasks, {examples}, {about['splits']} splits, test share "
        f"{about['test_share']:g}, selection {about['selection']}"
    )
    # One k in the middle of those measured stands for all: more lines could not be told apart.
    plotted = ["probe_loss", *(f"accuracy_{k}" for k in ks[len(ks) // 2 :][:1])]
    return Report("probing", title, records, columns, about, plotted, about["notes"], intervals=_INTERVALS)


def probe_records(
    parts: Sequence[dict[Key, Scores]],
    ks: Sequence[int],
    names: Sequence[str],
    bootstrap: CrossedBootstrap,
) -> list[dict[str, Any]]:
    """Return a record for each subject and width, over the tasks of all sets of examples.

    Args:
        parts (`Sequence[dict]`): Scores by subject and width, one dictionary for each set of examples.
        ks (`Sequence[int]`): Numbers of latents of k-sparse probes.
        names (`Sequence[str]`): Names of all tasks.
        bootstrap ([`CrossedBootstrap`]): Bootstrap of the intervals.
    """
    kinds = {CHANNELS: "channels", ALL_CHANNELS: "all channels"}
    joined = {key: _joined([part[key] for part in parts]) for key in parts[0]}
    channels = next((scores["loss"] for (name, _), scores in joined.items() if name == CHANNELS), None)
    rows = [
        {
            "subject": name,
            "kind": kinds.get(name) or kind_of(name),
            "width": width,
            **_row(scores, channels, ks, names, bootstrap),
        }
        for (name, width), scores in joined.items()
    ]
    if channels is not None:
        nothing = {"loss": np.full_like(channels, np.log(2)), "train_loss": np.full_like(channels, np.log(2))}
        rows.append(
            {"subject": NOTHING, "kind": "nothing", "width": None, **_row(nothing, channels, ks, names, bootstrap)}
        )
    return rows


def _joined(parts: Sequence[Scores]) -> dict[str, np.ndarray]:
    """Return the scores of several sets of examples with their tasks side by side."""
    joined = {}
    for name in ("loss", "train_loss", "latents", "k_sparse"):
        tensors = [torch.stack(values) for each in parts if (values := getattr(each, name))]
        if tensors:
            joined[name] = torch.cat(tensors, dim=2 if name == "k_sparse" else 1).numpy()
    return joined


def _row(
    results: dict[str, np.ndarray],
    channels: np.ndarray | None,
    ks: Sequence[int],
    names: Sequence[str],
    bootstrap: CrossedBootstrap,
) -> dict[str, Any]:
    loss = results["loss"]
    row = {
        "probe_loss": float(loss.mean()),
        "probe_loss_interval": bootstrap.interval(loss),
        "train_loss": float(results["train_loss"].mean()),
        "gain": None if channels is None else float((channels - loss).mean()),
        "gain_interval": None if channels is None else bootstrap.interval(channels - loss),
    }
    tasks = {
        name: {"loss": float(loss[:, t].mean()), "train_loss": float(results["train_loss"][:, t].mean())}
        for t, name in enumerate(names)
    }
    if "latents" in results:
        for t, name in enumerate(names):
            tasks[name]["latents"] = results["latents"][:, t].tolist()
    row["k_sparse"] = {}
    if "k_sparse" in results:
        scores = results["k_sparse"]
        # All channels together are one probe, of as many inputs as there are.
        for number, k in enumerate(ks if "latents" in results else [_OF_ALL]):
            row["k_sparse"][str(k)] = {}
            for s, score in enumerate(SCORES):
                values = scores[:, number, :, s]
                row["k_sparse"][str(k)][score] = float(values.mean())
                row["k_sparse"][str(k)][f"{score}_interval"] = bootstrap.interval(values)
            for t, name in enumerate(names):
                of_task = {score: float(scores[:, number, t, s].mean()) for s, score in enumerate(SCORES)}
                tasks[name].setdefault("k_sparse", {})[str(k)] = of_task
    return {**row, "tasks": tasks}
