"""A latent's page as HTML: examples, family, whether it is real, tokens it promotes; numbers at the end."""

from collections.abc import Sequence
from html import escape
from typing import Any

from ...features.tree.sums import LEAST, THRESHOLD
from . import html
from .chips import bar, chip, percent
from .links import latent_link
from .reading import SPECIAL, shown_token


_BANDS, _STRONGEST, _RELATIVES = 5, 6, 6
_BEFORE, _AFTER = 70, 40  # characters of a context
_MOST_CHIPS = 24
Current = tuple[str, str]


def feature_head(feature: dict[str, Any], current: Current) -> str:
    """What a latent is called, to be changed by the reader, and the verdict on it in a line."""
    latent = feature["latent"]
    address = escape(latent_link(*current, latent), quote=True)
    return (
        f'<div class="latent-head" data-of="{latent}" data-id="{feature["latent_id"]}" data-link="{address}">'
        f'<h2 tabindex="-1">Latent {latent}</h2>'
        f'<input class="naming" data-of="{latent}" value="{escape(feature["label"] or "", quote=True)}" '
        f'maxlength="80" placeholder="give it a name" aria-label="Name of latent {latent}, kept in your browser"/>'
        f'<p class="verdict">{escape(feature["verdict"])}</p></div>'
    )


def feature_page(feature: dict[str, Any], prefix_widths: list[int], current: Current) -> str:
    """What the index knows of a latent.

    Args:
        feature (`dict`): The result of `Endpoints.feature`.
        prefix_widths (`list[int]`): Prefix widths of its SAE.
        current (`tuple[str, str]`): Source and place of that SAE.
    """
    return "".join(
        [
            _examples(feature),
            _family(feature, current),
            _is_it_real(feature),
            _logits(feature),
            "<details><summary>Latents like it</summary>",
            _others("Nearest decoder rows (cosine)", feature["neighbours"], current),
            _others("Fire on its tokens (share)", feature["cofiring"], current),
            "</details>",
            _numbers(feature, prefix_widths),
        ]
    )


# Examples


def _examples(feature: dict[str, Any]) -> str:
    """A few contexts of each band of activation, strongest first; of an older index its strongest alone."""
    bands = feature["bands"] or [{"low": 0.0, "high": 1.0, "contexts": feature["contexts"][:_STRONGEST]}]
    parts = []
    for band in reversed(bands):
        if band["contexts"]:
            rows = "".join(f"<li>{context(row, feature['max'])}</li>" for row in band["contexts"])
            parts.append(f'<h4>{_band_name(band)} of its largest activation</h4><ol class="contexts">{rows}</ol>')
    return f'<section class="examples"><h3>Examples, strongest first</h3>{"".join(parts)}</section>' if parts else ""


def _band_name(band: dict[str, Any]) -> str:
    return f"{100 * band['low']:.0f}–{100 * band['high']:.0f}%"


def context(row: dict[str, Any], largest: float) -> str:
    """A context on a line or two, cut to what is around its peak; each line break is a sign."""
    texts, peak = [shown_token(text) for text in row["tokens"]], row["peak"]
    first, last = _reach(texts, peak, -1, _BEFORE), _reach(texts, peak, 1, _AFTER)
    shaded = html.tokens(texts[first : last + 1], row["activations"][first : last + 1], largest, peak - first)
    return f'<span class="value">{row["value"]:.3g}</span>{shaded}'


def _reach(texts: Sequence[str], peak: int, step: int, most: int) -> int:
    """The last token that is shown on one side of the peak: of the same document, and within so many characters."""
    place, length = peak, 0
    while 0 <= (after := place + step) < len(texts) and not SPECIAL.fullmatch(texts[after]):
        length += len(texts[after])
        if length > most:
            break
        place = after
    return place


# Family


def _family(feature: dict[str, Any], current: Current) -> str:
    """Ancestors, siblings and children as chips; those of low scores come with the threshold."""
    family, candidates = feature["family"], feature["candidates"]
    here = f'<b class="chip">{feature["latent"]} <span class="label" data-of="{feature["latent"]}">'
    here += f"{escape(feature['label'] or '')}</span></b>"
    above = [_chip(one, current) for one in reversed(family["ancestors"])]
    known = {one["latent"] for one in family["ancestors"]}
    others = [
        {"latent": latent, "score": score, "label": label}
        for latent, score, label in candidates
        if latent not in known
    ]
    lines = [
        ("Other parents it could have", others),
        ("Siblings", family["siblings"]),
        ("Refined by", family["children"]),
        ("Could refine it, had they not a better parent", family["could_refine"]),
    ]
    chips = "".join(f"<p><span>{title}</span> {_chips(ones, current)}</p>" for title, ones in lines if ones)
    if not above and not chips:
        return '<section class="family"><h3>Family</h3><p class="quiet">No parent and no children.</p></section>'
    chain = "".join(f"{one} " for one in above) + here
    least = _first_threshold([one["score"] for _, ones in lines for one in ones])
    slider = (
        f'<label>Score of at least <input type="range" min="0.2" max="0.95" step="0.05" value="{least:.2f}"/>'
        f"<output>{least:.2f}</output></label>"
    )
    return (
        f'<section class="family" data-of="{feature["latent"]}"><h3>Family</h3><p class="chain">{chain}</p>{chips}'
        f'<p class="none quiet" hidden="">None with such a score.</p>{slider}</section>'
    )


def _first_threshold(scores: Sequence[float]) -> float:
    """The least score of a parent, or less where that would show hardly a relative."""
    enough = sorted(scores, reverse=True)[:_RELATIVES]
    return THRESHOLD if not enough or enough[-1] >= THRESHOLD else max(LEAST, int(20 * enough[-1]) / 20)


def _chip(one: dict[str, Any], current: Current) -> str:
    return chip(current, one["latent"], one["label"], one.get("score"))


def _chips(ones: Sequence[dict[str, Any]], current: Current) -> str:
    more = ""
    if len(ones) > _MOST_CHIPS:  # hidden with those it stands for
        more = f' <span class="quiet" data-score="{ones[_MOST_CHIPS]["score"]:.3f}">and more</span>'
    return " ".join(_chip(one, current) for one in ones[:_MOST_CHIPS]) + more


# Is it real?


def _is_it_real(feature: dict[str, Any]) -> str:
    """Precision by band of activation beside that of a random latent, and how often it fires how strongly."""
    if not feature["count"]:
        return ""
    rows = []
    for band in reversed(feature["bands"]):
        measured = band["precision"] is not None
        share = bar(band["precision"], "", band["base"], "a random latent") if measured else "none looked at"
        rows.append(
            f"<tr><th scope=row>{_band_name(band)}</th><td class=number>{band['firings']:,}</td><td>{share}</td>"
            f"<td class=number>{percent(band['base'])}</td></tr>"
        )
    table = ""
    if rows:
        own = ", ".join(f"<code>{_token(text)}</code>" for text in feature["own_tokens"])
        own = f": {own}" if own else ""
        table = (
            f'<p class="quiet">Its own tokens are those of its strongest firings on one half of the text{own}; how '
            "many of its firings are on them is counted on the other half.</p><table><thead><tr>"
            "<th scope=col>of its largest</th><th scope=col class=number>firings</th>"
            "<th scope=col>on its own tokens</th>"
            f"<th scope=col class=number>random</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
    return f'<section class="real"><h3>Is it real?</h3>{table}{_histogram(feature)}</section>'


def _histogram(feature: dict[str, Any]) -> str:
    """Tokens by activation, coloured by band; the activation is logarithmic."""
    edges, counts = feature["histogram"]["edges"], feature["histogram"]["counts"]
    if not len(counts) or max(counts) <= 0:
        return ""
    step, high = 300 / len(counts), max(counts)
    bars = "".join(
        f'<rect class="band{_band((left + right) / 2, feature["max"])}" x="{number * step:.1f}" '
        f'y="{80 - 76 * count / high:.1f}" width="{max(0.5, step - 0.8):.1f}" height="{76 * count / high:.1f}">'
        f"<title>{left:.3g} to {right:.3g}: {count:,.0f} tokens</title></rect>"
        for number, (left, right, count) in enumerate(zip(edges[:-1], edges[1:], counts, strict=True))
    )
    most = max(range(len(counts)), key=lambda place: counts[place])
    said = f"Tokens by activation, {edges[0]:.3g} to {edges[-1]:.3g}; most between {edges[most]:.3g} and "
    return (
        f'<figure class="histogram"><svg viewBox="0 0 300 82" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}{edges[most + 1]:.3g}">{bars}</svg>'
        f"<figcaption><span>{edges[0]:.3g}</span><span>activation (logarithmic); fuller is a stronger band</span>"
        f"<span>{edges[-1]:.3g}</span></figcaption></figure>"
    )


def _band(value: float, largest: float) -> int:
    """The band of an activation: 0 is up to a fifth of the largest."""
    return min(_BANDS - 1, int(value / largest * _BANDS)) if largest > 0 else 0


# Logits and numbers


def _logits(feature: dict[str, Any]) -> str:
    """Tokens whose logits it raises and lowers most, as bars."""
    if not feature["promoted"]:
        return ""  # an encoder has no logits
    most = max(abs(value) for _, value in [*feature["promoted"], *feature["suppressed"]]) or 1.0

    def column(title: str, pairs: Sequence[Sequence[Any]]) -> str:
        rows = "".join(
            f"<li><code>{_token(text)}</code>{bar(abs(value) / most, f'{value:+.2f}')}</li>" for text, value in pairs
        )
        return f'<section><h4>{title}</h4><ul class="logits">{rows}</ul></section>'

    return (
        '<section><h3>What it does to the next token</h3><div class="columns">'
        f"{column('More likely', feature['promoted'][:8])}{column('Less likely', feature['suppressed'][:8])}"
        "</div></section>"
    )


def _token(text: str) -> str:
    return escape(shown_token(text).replace(" ", "␣")) or "∅"


def _others(title: str, others: Sequence[Sequence[Any]], current: Current) -> str:
    if not others:
        return ""
    chips = " ".join(chip(current, latent, label, value) for latent, value, label in others)
    return f'<p class="chips"><span>{title}</span> {chips}</p>'


def _numbers(feature: dict[str, Any], widths: list[int]) -> str:
    """Ranks and figures, folded away."""
    facts = [
        ("fires on", f"{feature['frequency']:.3%} of tokens ({feature['count']:,})"),
        ("energy E[a²]", f"{feature['energy']:.4g}"),
        ("largest activation", f"{feature['max']:.4g}"),
        ("median where it fires", html.number(feature["quantiles"].get("0.5"))),
        ("at a first position", f"{feature['first_position_share']:.1%} of its firings"),
        ("prefixes that contain it", f"{len(feature['widths'])} of {len(widths)}, from {feature['widths'][0]:,} on"),
        *(
            (f"rank by {ranking}", f"{place + 1:,}")
            for ranking, place in feature["places"].items()
            if ranking != "trained"
        ),
    ]
    if feature["latent_id"] != feature["latent"]:
        facts.append(("number before sorting or pruning", str(feature["latent_id"])))
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return f"<details><summary>Ranks and numbers</summary><dl>{rows}</dl></details>"
