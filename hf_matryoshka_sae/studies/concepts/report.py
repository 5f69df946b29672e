"""The report of SCR and TPP: how the ablation of a few latents changes probes, with a warning."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...common.intervals import CrossedBootstrap
from ...common.report import Column, Report
from ..drawn_latents import kind_of


WARNING = (
    "An audit (arXiv 2605.18229) found that SCR and TPP fail several checks at canonical settings: do not rank SAEs "
    "by them."
)
HEADLINE = 20
_MEANINGS = {
    "scr": "share of the accuracy that a probe loses to a spurious attribute and regains where the {} latents that "
    "indicate that attribute most are ablated.",
    "tpp": "balanced accuracy that a class's probe loses where the {} latents that indicate the class most are "
    "ablated, less the mean loss of the other classes' probes.",
}
_TASKS = {
    "scr": "Of each task, base: accuracy of the biased probe; clean: accuracy of a probe fitted to all combinations; "
    "keeps_first: share of splits in which the pair's first attribute was to be kept. Intervals: 95%, bootstrap over "
    "splits and pairs.",
    "tpp": "Intervals: 95%, bootstrap over splits and classes.",
}


def removal_report(
    scores: Mapping[tuple[str, int], np.ndarray],
    about: dict[str, Any],
    bootstrap: CrossedBootstrap,
) -> Report:
    """Return the report from scores `(S, T, K)` of each subject and width.

    Each record has, by number of ablated latents (as `str`), `score`, `interval` and `tasks`: the score of each pair
    or class by name.

    Args:
        scores (`Mapping[tuple[str, int], np.ndarray]`): Scores by subject and width.
        about (`dict`): Settings and tasks of the measurement.
        bootstrap ([`CrossedBootstrap`]): Bootstrap of the intervals.
    """
    records = []
    for (name, width), values in scores.items():
        record = {"subject": name, "kind": kind_of(name), "width": width, "score": {}, "interval": {}, "tasks": {}}
        for number, count in enumerate(map(str, about["latents"])):
            of_count = values[:, :, number]
            record["score"][count] = float(of_count.mean())
            record["interval"][count] = bootstrap.interval(of_count)
            record["tasks"][count] = dict(zip(about["tasks"], of_count.mean(0).tolist(), strict=True))
        records.append(record)
    metric = about["metric"]
    columns = [
        Column(
            f"{metric}_{count}",
            f"N = {count}",
            _MEANINGS[metric].format(count),
            ".3f",
            "higher",
            path=f"score.{count}",
            interval=f"interval.{count}",
        )
        for count in about["latents"]
    ]
    (kind, examples), *_ = about["examples"].items()
    what = "pairs of attributes" if metric == "scr" else "classes"
    title = (
        f"{metric.upper()} at {about['hookpoint']}: {len(about['tasks'])} {what}, {examples} {kind}, "
        f"{about['splits']} splits, selection {about['selection']}; N latents ablated"
    )
    plotted = [column.name for column in columns]
    return Report(metric, title, records, columns, about, plotted, warning=WARNING, intervals=_TASKS[metric])
