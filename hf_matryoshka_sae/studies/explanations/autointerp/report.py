"""What the explanations of several dictionaries are worth, as a report."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ....common.report import Column, Report
from ...drawn_latents import as_records
from ..by_frequency import by_frequency, frequency_text
from .examination import COUNTS, SCORES, Interpreted


_UNINFORMED = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0}
_MEANINGS = {
    "detection": "balanced accuracy of telling passages in which the latent is active from others (0.5 says nothing).",
    "detection_f1": "F1 of the same.",
    "detection_accuracy": "accuracy of the same.",
    "detection_all_no": "accuracy of answering none.",
    "fuzzing": "balanced accuracy of telling right marks from wrong ones (0.5 says nothing).",
    "simulation": "Pearson correlation of predicted and actual activations over a latent's joined passages, 0 where "
    "either is constant (counted).",
    "questions": "asked of the judge.",
    "refusals": "answers that were refused; they score as having said nothing.",
    "malformed": "answers in another form than asked for; they score as having said nothing.",
    "constant": "latents of which simulated or actual activations do not vary.",
    "crowded": "latents with fewer passages without them than asked for.",
}
_INTERVALS = (
    "Passages with ten tokens on either side, from other text than the explanations. Intervals: 95%, bootstrap over "
    "the drawn latents within groups; none over fewer than eight."
)


def interpretability_report(
    rows: Mapping[str, list[dict[str, Any]]], latents: Mapping[str, list[Interpreted]], about: dict[str, Any]
) -> Report:
    """The report from rows by name: scores, and of the drawn latents sums of questions and what became of them."""
    scores = about["scores"]
    columns = [
        Column("latents", "drawn", "latents that were drawn.", "d"),
        Column("explainable", "explainable", "share that fire often enough in both texts.", ".1%", "higher"),
    ]
    for name in (name for score in scores for name in SCORES[score]):
        main = name in scores
        shown, uninformed = "interval" if main else "nothing", _UNINFORMED.get(name)
        better = None if name == "detection_all_no" else "higher"
        columns.append(Column(name, name, _MEANINGS[name], ".3f", better, table=shown, uninformed=uninformed))
    columns += [Column(name, name, _MEANINGS[name], "d") for name in COUNTS]
    judge = f"{'' if about['stand_in'] else 'judge: '}{about['judge']}"
    title = f"{about['hookpoint']}: automated interpretability ({judge})"
    plain = {
        name: [SimpleNamespace(frequency=one.frequency, **one.scores) for one in found]
        for name, found in latents.items()
    }
    about["by_frequency"] = by_frequency(plain, scores, seed=about["seed"])
    more = frequency_text(about["by_frequency"], columns, scores)
    options = {"intervals": _INTERVALS, "latents": dict(latents), "grouped": True, "more": more}
    return Report("autointerp", title, as_records(rows), columns, about, scores, _notes(rows, about), **options)


def _notes(rows: Mapping[str, list[dict[str, Any]]], about: dict[str, Any]) -> list[str]:
    judge = about["judge"]
    notes = [judge[:1].upper() + judge[1:] if about["stand_in"] else f"Judge: {judge}"]
    widest = [of_name[-1] for of_name in rows.values()]
    unusable = sum(row["malformed"] + row["refusals"] for row in widest)
    if unusable:
        notes.append(
            f"{unusable} of {sum(row['questions'] for row in widest)} answers were refusals or malformed, and count "
            "as saying nothing: see `refusals` and `malformed` by dictionary"
        )
    return notes if about["stand_in"] else [*notes, _cost(about["cost"])]


def _cost(cost: dict[str, Any]) -> str:
    line = (
        f"{cost['asked']} answers asked for, {cost['cached']} from the cache; {cost['prompt_tokens']:,} tokens read "
        f"and {cost['completion_tokens']:,} written in {cost['seconds']:.0f} s of the judge's time"
    )
    if cost["uncounted"]:
        line += f", those of {cost['uncounted']} answers not told"
    return line + (f"; {cost['money']:.2f} at the price given" if "money" in cost else "")
