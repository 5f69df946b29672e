"""Results as people read them: a table, a plot, a JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_matryoshka_sae.common.figures import draw_widths, save_figure


ABOUT = (
    "fvu: squared error over the variance about the held-out mean. recaptured: (ablated - spliced) / "
    "(ablated - clean) cross-entropy, with the hidden states replaced by zero (zero) or by their mean (mean) as the "
    "ablation. compute: training compute of a model of that loss, as a share of this one's, by the scaling law that "
    "was given. kl: from the clean model's predictions, in nats. rsa: rank correlation of the tokens' cosine "
    "similarities before and after. dead: share of the prefix's latents that never fire on the held-out tokens. "
    "selection mask: all latents compete for places, those past the width are dropped; the same as encoding the "
    "prefix alone wherever a threshold decides."
)

_COLUMNS = (
    ("width", "width", 8, "d"),
    ("L0", "l0", 8, ".2f"),
    ("FVU", "fvu", 8, ".4f"),
    ("CE", "ce", 8, ".4f"),
    ("recaptured", "recaptured_zero", 11, ".4f"),
    ("(mean abl.)", "recaptured_mean", 11, ".4f"),
    ("compute", "compute_share", 8, ".2%"),
    ("KL", "kl", 8, ".4f"),
    ("RSA", "rsa", 7, ".4f"),
    ("dead", "dead", 7, ".2%"),
    ("bits", "bits", 8, ".2f"),  # per token, of the progressive code; and the FVU of what it decodes to
    ("FVU coded", "fvu_coded", 10, ".4f"),
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as text, a line per width.

    Args:
        results (`Sequence[dict]`): What `evaluate_fidelity` gives for each hookpoint, with a `hookpoint` added.
    """
    lines = []
    for result in results:
        lines.append(f"{result['hookpoint']}: {result['tokens']} held-out tokens, {_losses(result)}")
        lines += [f"  {sentence}" for sentence in excluded(result)]
        found = [row for rows in result["saes"].values() for row in rows]
        columns = [column for column in _COLUMNS if any(_value(row, column[1]) is not None for row in found)]
        for name, rows in result["saes"].items():
            lines.append(f"  {name} (selection: {result.get('selection', 'mask')})")
            lines.append("  " + " ".join(f"{title:>{size}}" for title, _, size, _ in columns))
            lines += ["  " + " ".join(_cell(row, *column[1:]) for column in columns) for row in rows]
    return "\n".join(lines)


def excluded(result: dict[str, Any]) -> list[str]:
    """Sentences about what is in no figure because the language model gives NaN or infinity there."""
    numbers = (result.get("excluded_windows"), "windows"), (result.get("excluded_predictions"), "other predictions")
    return [
        f"{number:,} {what} of held-out text are in no figure at {result['hookpoint']}: the language model gives NaN "
        "or infinity there. Load it in another type (float32 or bfloat16)."
        for number, what in numbers
        if number
    ]


def _losses(result: dict[str, Any]) -> str:
    if result["clean_ce"] is None:
        return "no language-model loss"
    ce = {name: _number(result[f"{name}_ce"], ".4f") for name in ("clean", "zero", "mean")}
    return f"CE clean {ce['clean']}, zero-ablated {ce['zero']}, mean-ablated {ce['mean']}"


def _value(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value["spearman"] if isinstance(value, dict) else value


def _cell(row: dict[str, Any], key: str, size: int, form: str) -> str:
    return f"{_number(_value(row, key), form):>{size}}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw FVU and recaptured loss against width to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    drawn = [("fvu", "fraction of variance unexplained"), ("recaptured_zero", "recaptured loss (zero ablation)")]
    named = {
        f"{name} @ {result['hookpoint']}" if len(results) > 1 else name: rows
        for result in results
        for name, rows in result["saes"].items()
    }
    for axis, (key, label) in zip(axes, drawn, strict=True):
        of_key = {name: [row for row in rows if row.get(key) is not None] for name, rows in named.items()}
        draw_widths(axis, {name: [(row["width"], row[key], None) for row in rows] for name, rows in of_key.items()})
        axis.set_ylabel(label)
    axes[0].set_ylim(0, min(axes[0].get_ylim()[1], 1.2))
    if axes[1].lines:
        axes[1].set_ylim(max(axes[1].get_ylim()[0], -0.2), 1)
    axes[0].legend(fontsize=8)
    figure.suptitle("Held-out reconstruction at every width")
    save_figure(figure, path)
