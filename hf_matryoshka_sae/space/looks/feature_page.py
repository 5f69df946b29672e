"""A latent's page as HTML."""

from html import escape
from typing import Any

from . import html
from .charts import Axis, bar_chart


def feature_page(
    feature: dict[str, Any], below: list[list[dict[str, Any]]], prefix_widths: list[int], current: tuple[str, str]
) -> str:
    """What the index knows of a latent.

    Args:
        feature (`dict`): The result of `Endpoints.feature`.
        below (`list[list[dict]]`): The latents below it in the tree, level by level, as `Endpoints.family` gives them.
        prefix_widths (`list[int]`): Prefix widths of its SAE.
        current (`tuple[str, str]`): Source and place of that SAE.
    """
    label = f" — {escape(feature['label'])}" if feature["label"] else ""
    histogram = feature["histogram"]
    parts = [
        f"<h2>Latent {feature['latent']}{label}</h2>",
        "" if feature["count"] else '<p class="note">It never fired on the text of this index.</p>',
        _facts(feature),
        _widths(feature, prefix_widths),
        '<div class="wide"><section>',
        "<h3>How strongly it fires</h3>",
        bar_chart(histogram["edges"], histogram["counts"], Axis("activation", log=True), "tokens"),
        "</section><section>",
        _logits(feature),
        "</section></div>",
        "<h3>Where it fires most</h3>",
        html.contexts(feature["contexts"], feature["max"]),
        _quantiles(feature),
        '<div class="wide"><section>',
        _family(feature, below[1:], current),
        "</section><section>",
        _others("Nearest decoder rows", "cosine", feature["neighbours"], current),
        _others("Fires together with", "share of its tokens", feature["cofiring"], current),
        "</section></div>",
    ]
    return "".join(parts)


def _facts(feature: dict[str, Any]) -> str:
    facts = [
        ("fires on", f"{feature['frequency']:.3%} of tokens ({feature['count']:,})"),
        ("energy E[a²]", f"{feature['energy']:.4g}"),
        ("largest activation", f"{feature['max']:.4g}"),
        ("median where it fires", html.number(feature["quantiles"].get("0.5"))),
        ("at a first position", f"{feature['first_position_share']:.1%}"),
    ]
    if feature["latent_id"] != feature["latent"]:
        facts.append(("id before sorting or pruning", str(feature["latent_id"])))
    items = "".join(f"<li>{name} <b>{value}</b></li>" for name, value in facts)
    return f'<ul class="facts">{items}</ul>'


def _widths(feature: dict[str, Any], widths: list[int]) -> str:
    """Which widths still contain it."""
    inside = ", ".join(f"{width:,}" for width in feature["widths"])
    lines = [f"<li>Prefixes that contain it: <b>{inside}</b> (of {', '.join(f'{w:,}' for w in widths)}).</li>"]
    for ranking, place in feature["places"].items():
        if ranking != "trained":
            lines.append(f"<li>By {ranking} it is number {place + 1:,}: widths from {place + 1:,} on contain it.</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _logits(feature: dict[str, Any]) -> str:
    if not feature["promoted"]:
        return "<h3>Tokens it promotes</h3><p class=quiet>Not known: the model has no unembedding.</p>"
    rows = [
        [f"<code>{_token(up[0])}</code>", f"{up[1]:+.3f}", f"<code>{_token(down[0])}</code>", f"{down[1]:+.3f}"]
        for up, down in zip(feature["promoted"], feature["suppressed"], strict=False)
    ]
    return "<h3>Tokens it promotes and suppresses</h3>" + html.table(
        ["promoted", "logit", "suppressed", "logit"], rows, numbers=(1, 3)
    )


def _token(text: str) -> str:
    return escape(text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")) or "(empty)"


def _quantiles(feature: dict[str, Any]) -> str:
    parts = feature["quantile_contexts"]
    sections = "".join(
        f"<h3>Part {number + 1} of {len(parts)}{', the weakest' if number == 0 else ''}</h3>"
        f"{html.contexts(rows, feature['max'])}"
        for number, rows in enumerate(parts)
        if rows
    )
    if not sections:
        return ""
    return f"<details><summary>Samples from weak to strong firings</summary>{sections}</details>"


def _family(feature: dict[str, Any], deeper: list[list[dict[str, Any]]], current: tuple[str, str]) -> str:
    parts = ["<h3>Family in the tree</h3>"]
    if feature["parent"] is None and not feature["children"]:
        return parts[0] + "<p class=quiet>No parent and no children.</p>"
    if feature["parent"] is not None:
        latent, score, label = feature["parent"]
        name = html.latent_name(*current, latent, label)
        parts.append(f"<p>Refines {name} (score {score:.2f}).</p>")
    parts.append(_others("Refined by", "score", feature["children"], current) if feature["children"] else "")
    for number, level in enumerate(deeper, start=2):
        names = ", ".join(html.latent_name(*current, row["latent"]) for row in level[:100])
        parts.append(f"<p>{number} levels below: {names}</p>")
    return "".join(parts)


def _others(title: str, column: str, others: list[list[Any]], current: tuple[str, str]) -> str:
    if not others:
        return f"<h3>{title}</h3><p class=quiet>None.</p>"
    rows = [[html.latent_name(*current, latent, label), f"{value:.3f}"] for latent, value, label in others]
    return f"<h3>{title}</h3>" + html.table(["latent", column], rows, numbers=(1,))
