"""A latent's page as HTML."""

from html import escape
from typing import Any

from . import html
from .charts import Axis, bar_chart


def feature_page(
    found: dict[str, Any], below: list[list[dict[str, Any]]], prefix_widths: list[int], current: tuple[str, str]
) -> str:
    """What the index knows of a latent.

    Args:
        found (`dict`): What `Endpoints.feature` gives.
        below (`list[list[dict]]`): The latents below it in the tree, level by level, as `Endpoints.family` gives them.
        prefix_widths (`list[int]`), current (`tuple[str, str]`): Of its SAE; and which that is, by source and place.
    """
    label = f" — {escape(found['label'])}" if found["label"] else ""
    histogram = found["histogram"]
    parts = [
        f"<h2>Latent {found['latent']}{label}</h2>",
        "" if found["count"] else '<p class="note">It never fired on the text of this index.</p>',
        _facts(found),
        _widths(found, prefix_widths),
        '<div class="wide"><section>',
        "<h3>How strongly it fires</h3>",
        bar_chart(histogram["edges"], histogram["counts"], Axis("activation", log=True), "tokens", (380, 200)),
        "</section><section>",
        _logits(found),
        "</section></div>",
        "<h3>Where it fires most</h3>",
        html.contexts(found["contexts"], found["max"]),
        _quantiles(found),
        '<div class="wide"><section>',
        _family(found, below[1:], current),
        "</section><section>",
        _others("Nearest decoder rows", "cosine", found["neighbours"], current),
        _others("Fires together with", "share of its tokens", found["cofiring"], current),
        "</section></div>",
    ]
    return "".join(parts)


def _facts(found: dict[str, Any]) -> str:
    facts = [
        ("fires on", f"{found['frequency']:.3%} of tokens ({found['count']:,})"),
        ("energy E[a²]", f"{found['energy']:.4g}"),
        ("largest activation", f"{found['max']:.4g}"),
        ("median where it fires", html.number(found["quantiles"].get("0.5"))),
        ("at a first position", f"{found['first_position_share']:.1%}"),
    ]
    if found["latent_id"] != found["latent"]:
        facts.append(("id before sorting or pruning", str(found["latent_id"])))
    items = "".join(f"<li>{name} <b>{value}</b></li>" for name, value in facts)
    return f'<ul class="facts">{items}</ul>'


def _widths(found: dict[str, Any], widths: list[int]) -> str:
    """Which widths still contain it."""
    inside = ", ".join(f"{width:,}" for width in found["widths"])
    lines = [f"<li>Prefixes that contain it: <b>{inside}</b> (of {', '.join(f'{w:,}' for w in widths)}).</li>"]
    for ranking, place in found["places"].items():
        if ranking != "trained":
            lines.append(f"<li>By {ranking} it is number {place + 1:,}: widths from {place + 1:,} on contain it.</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _logits(found: dict[str, Any]) -> str:
    if not found["promoted"]:
        return "<h3>Tokens it promotes</h3><p class=quiet>Not known: the model has no unembedding.</p>"
    rows = [
        [f"<code>{_token(up[0])}</code>", f"{up[1]:+.3f}", f"<code>{_token(down[0])}</code>", f"{down[1]:+.3f}"]
        for up, down in zip(found["promoted"], found["suppressed"], strict=False)
    ]
    return "<h3>Tokens it promotes and suppresses</h3>" + html.table(
        ["promoted", "logit", "suppressed", "logit"], rows, numbers=(1, 3)
    )


def _token(text: str) -> str:
    return escape(text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")) or "(empty)"


def _quantiles(found: dict[str, Any]) -> str:
    parts = found["quantile_contexts"]
    sections = "".join(
        f"<h3>Part {number + 1} of {len(parts)}{', the weakest' if number == 0 else ''}</h3>"
        f"{html.contexts(rows, found['max'])}"
        for number, rows in enumerate(parts)
        if rows
    )
    if not sections:
        return ""
    return f"<details><summary>Samples from weak to strong firings</summary>{sections}</details>"


def _family(found: dict[str, Any], deeper: list[list[dict[str, Any]]], current: tuple[str, str]) -> str:
    parts = ["<h3>Family in the tree</h3>"]
    if found["parent"] is None and not found["children"]:
        return parts[0] + "<p class=quiet>No parent and no children.</p>"
    if found["parent"] is not None:
        latent, score, label = found["parent"]
        name = html.latent_name(*current, latent, label)
        parts.append(f"<p>Refines {name} (score {score:.2f}).</p>")
    parts.append(_others("Refined by", "score", found["children"], current) if found["children"] else "")
    for number, level in enumerate(deeper, start=2):
        names = ", ".join(html.latent_name(*current, row["latent"]) for row in level[:100])
        parts.append(f"<p>{number} levels below: {names}</p>")
    return "".join(parts)


def _others(title: str, column: str, others: list[list[Any]], current: tuple[str, str]) -> str:
    if not others:
        return f"<h3>{title}</h3><p class=quiet>None.</p>"
    rows = [[html.latent_name(*current, latent, label), f"{value:.3f}"] for latent, value, label in others]
    return f"<h3>{title}</h3>" + html.table(["latent", column], rows, numbers=(1,))
