"""Results of an evaluation for readers: a table and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.report import Column, Report


_COLUMNS = (
    Column("l0", "L0", "latents that fire per token.", ".2f"),
    Column("fvu", "FVU", "squared error over the variance about the held-out mean.", better="lower", limits=(0, 1.2)),
    Column("ce", "CE", "cross-entropy with the reconstruction in the place of the hidden states, in nats."),
    Column(
        "recaptured_zero",
        "recaptured",
        "(ablated - spliced) / (ablated - clean) cross-entropy, with the hidden states replaced by zero as the "
        "ablation.",
        better="higher",
        limits=(-0.2, 1),
    ),
    Column("recaptured_mean", "(mean abl.)", "the same, with them replaced by their mean."),
    Column(
        "compute_share",
        "compute",
        "training compute of a model of that loss, as a share of this one's, by the scaling law that was given.",
        ".2%",
    ),
    Column(
        "pooled_cosine",
        "pooled cos",
        "cosine of pooled embeddings of texts with the reconstruction in the place of the hidden states, for models "
        "without a loss.",
        better="higher",
    ),
    Column("neighbours", "neighbours", "share of each text's nearest texts that stay.", ".3f", better="higher"),
    Column("kl", "KL", "from the clean model's predictions, in nats."),
    Column(
        "rsa",
        "RSA",
        "rank correlation of the tokens' cosine similarities before and after.",
        path="rsa.spearman",
        table="value",
    ),
    Column("dead", "dead", "share of the prefix's latents that never fire on the held-out tokens.", ".2%"),
    Column(
        "rare",
        "under 1e-6",
        "share of the prefix's latents that fire on less than one token in a million, extrapolated.",
        ".2%",
    ),
    Column("bits", "bits", "per token, of the progressive code.", ".2f"),
    Column("fvu_coded", "FVU coded", "of the reconstruction from that code."),
)
_SELECTION = (
    "selection mask: all latents compete for places, those past the width are dropped; the same as encoding the "
    "prefix alone wherever a threshold decides."
)
ABOUT = Report("", "", [], _COLUMNS, {}, intervals=_SELECTION).explanation


def records_of(result: dict[str, Any], several: bool = False) -> list[dict[str, Any]]:
    """Return records of a [`Report`] from a hookpoint's results; of `several` hookpoints names say which."""
    place = f" @ {result['hookpoint']}" if several else ""
    subjects = {**result["saes"], **(result.get("baselines") or {})}
    return [
        {"subject": f"{name}{place}", "kind": "random" if name.startswith("random (") else "dictionary", **row}
        for name, rows in subjects.items()
        for row in rows
    ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return results as text, a line per width.

    Args:
        results (`Sequence[dict]`): Results of [`evaluate`], one for each hookpoint.
    """
    return "\n".join(map(str, map(report_of, results)))


def report_of(result: dict[str, Any]) -> Report:
    """Return the [`Report`] of a hookpoint's results."""
    about = f"{result['tokens']} held-out tokens, {_losses(result)}, selection {result.get('selection', 'mask')}"
    title = f"{result['hookpoint']}: {about}"
    notes = excluded(result)
    if result.get("baselines"):
        notes.append(
            f"on {result['baseline_tokens']} of the tokens, random: directions drawn at random that fire as often; "
            "principal components: that many dense numbers per token, up to the width of the hidden states"
        )
    return _report(title, records_of(result), notes)


def _report(title: str, records: list[dict[str, Any]], notes: list[str]) -> Report:
    plotted = [
        name
        for name in ("fvu", "recaptured_zero", "neighbours")
        if any(record.get(name) is not None for record in records)
    ]
    return Report("evaluation", title, records, _COLUMNS, {}, plotted or ["fvu"], notes)


def excluded(result: dict[str, Any]) -> list[str]:
    """Return sentences about tokens that no figure counts, because the language model gives NaN or infinity there."""
    numbers = (result.get("excluded_windows"), "windows"), (result.get("excluded_predictions"), "other predictions")
    return [
        f"{number:,} {what} of held-out text are in no figure at {result['hookpoint']}: the language model gives NaN "
        "or infinity there. Load it in another type (float32 or bfloat16)."
        for number, what in numbers
        if number
    ]


def _losses(result: dict[str, Any]) -> str:
    if result["clean_ce"] is None:
        pooled = result.get("pooled")
        if not pooled or pooled["neighbours"] is None:
            return "no language-model loss"
        return (
            f"no language-model loss; with the mean in place of hidden states, pooled cos "
            f"{pooled['pooled_cosine']:.4f} and neighbours {pooled['neighbours']:.3f} over {pooled['windows']} texts"
        )
    clean, zero, mean = (format(result[f"{name}_ce"], ".4f") for name in ("clean", "zero", "mean"))
    return f"CE clean {clean}, zero-ablated {zero}, mean-ablated {mean}"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw FVU and recaptured loss against width to a PNG."""
    records = [record for result in results for record in records_of(result, len(results) > 1)]
    _report("Held-out reconstruction at every width", records, []).plot(path)
