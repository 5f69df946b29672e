"""Pieces of the page as HTML: latents as links, tokens, tables. Everything that is text is escaped."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .links import latent_link


_SHOWN = str.maketrans({"\n": "↵\n", "\t": "⇥\t", "\r": "␍"})


def visible(text: str) -> str:
    """A token's text with signs for what would not be seen; still to be escaped."""
    return text.translate(_SHOWN)


def latent_name(sae: str, place: str, latent: int, label: str = "") -> str:
    """A latent as a link, with what it fires on."""
    about = f' <span class="quiet">{escape(label)}</span>' if label else ""
    address = escape(latent_link(sae, place, latent), quote=True)
    return f'<a href="{address}" data-latent="{latent}">{latent}</a>{about}'


def tokens(texts: Sequence[str], values: Sequence[float], largest: float, peak: int | None = None) -> str:
    """Tokens in a row, shaded by values between 0 and `largest`; those below 0 in the second colour.

    Args:
        texts (`Sequence[str]`): The tokens as they stand in the text.
        values (`Sequence[float]`): Of each; NaN is not shaded.
        largest (`float`): What is shaded most.
        peak (`int`, *optional*): A token to mark.
    """
    parts: list[str] = []
    plain: list[str] = []
    for number, (text, value) in enumerate(zip(texts, values, strict=True)):
        escaped = escape(visible(text))
        if number != peak and (not math.isfinite(value) or abs(value) < 0.005 * largest):
            plain.append(escaped)
            continue
        if plain:
            parts.append("".join(plain))
            plain = []
        share = min(1.0, abs(value) / largest) if largest > 0 and math.isfinite(value) else 0.0
        sign = " below" if value < 0 else ""
        tag = "mark" if number == peak else "span"
        parts.append(f'<{tag} class="token{sign}" style="--share:{share:.2f}" title="{value:.3g}">{escaped}</{tag}>')
    return f'<span class="tokens">{"".join([*parts, *plain])}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", numbers: Sequence[int] = ()) -> str:
    """A table. Cells are HTML: the caller escapes them.

    Args:
        head (`Sequence[str]`): Names of the columns.
        rows (`Iterable[Sequence[str]]`): Cells.
        caption (`str`, *optional*): What it shows; escaped.
        numbers (`Sequence[int]`, *optional*): Columns of numbers, set to the right.
    """

    def cell(tag: str, number: int, value: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{' class=number' if number in numbers else ''}>{value}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, number, value) for number, value in enumerate(cells))}</tr>"

    about = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table>{about}<thead>{line("th", [escape(name) for name in head])}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def number(value: float | None, form: str = ".4g") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def data(name: str, given: Any) -> str:
    """Return one of the page's own elements, with what it shows."""
    return f'<{name} data-given="{escape(json.dumps(given), quote=True)}"></{name}>'


def picture(svg: str, kept: set[int] | None = None) -> str:
    """Return the picture of the prefixes as the page shows it.

    Args:
        svg (`str`): The picture.
        kept (`set[int]`, *optional*): Latents that are not dimmed; by default those of the page's width, live.
    """
    if not svg:
        return ""
    drawn = {int(latent) for latent in re.findall(r'data-latent="(\d+)"', svg)}
    given = "" if kept is None else f' data-given="{json.dumps(sorted(drawn & kept))}"'
    return f'<nested-picture class="scroll"{given}>{svg}</nested-picture>'
