"""A text coloured by the latents that fire on it; a script shows a token's latents, and colours by one of them."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...common.token_text import LOST


_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_GOLDEN = 137.508  # degrees: neighbouring numbers get colours far apart
SPECIAL = re.compile(r"<\|.*\|>|</?s>|\[(CLS|SEP|PAD)\]")
"""Between documents, or around a text: no part of it."""

Firings = Sequence[Sequence[Sequence[Any]]]
"""For each token the latents that fire on it with their values, strongest first."""


def shown_token(text: str) -> str:
    """A token's text with a sign for each line break, and one for bytes that are no whole character; to be escaped."""
    return re.sub(r"\s*\n\s*", "↵ ", text).replace("\r", "").replace("\t", " ").replace(LOST, "⋯")


def reading(
    tokens: Sequence[str],
    firings: Mapping[int, Firings],
    largest: Mapping[int, float],
    labels: Mapping[int, str],
    width: int,
    continuations: Mapping[int, str] | None = None,
) -> str:
    """A text, each token in the colour of its strongest latent.

    Args:
        tokens (`Sequence[str]`): Texts of the T tokens.
        firings (`dict[int, Firings]`): By width of the SAE, each of T tokens.
        largest (`dict[int, float]`): What counts as a full firing of each latent that is named in `firings`.
        labels (`dict[int, str]`): What those latents are called.
        width (`int`): The width to begin with; the widest of `firings` that is no wider is shown.
        continuations (`dict[int, str]`, *optional*): How the model goes on at each width.

    Returns:
        `str`: HTML. Everything that is text is escaped.
    """
    widths = sorted(firings)
    rows = [number for number, text in enumerate(tokens) if not SPECIAL.fullmatch(text)]
    tokens, firings = [tokens[n] for n in rows], {one: [firings[one][n] for n in rows] for one in widths}
    written = {one: shown_token(text) for one, text in (continuations or {}).items()}
    now = max((one for one in widths if one <= width), default=widths[0])
    known = {
        "widths": widths,
        "firings": [firings[one] for one in widths],
        "largest": {str(latent): round(value, 4) for latent, value in largest.items()},
        "labels": {str(latent): label for latent, label in labels.items()},
        "continuations": [written[one] for one in widths] if written else None,
    }
    buttons = "".join(
        f'<button type="button" class="tok" tabindex="{0 if number == 0 else -1}" style="{_colour(latents, largest)}">'
        f"{escape(shown_token(text)) or '∅'}</button>"
        for number, (text, latents) in enumerate(zip(tokens, firings[now], strict=True))
    )
    goes_on = ""
    if written:
        lead = "With the hidden states that these latents leave, the model goes on:"
        goes_on = f'<p>{lead} <span class="goes-on">{escape(written[now])}</span></p>'
    return (
        f'<div class="reading" data-reading="{escape(json.dumps(known), quote=True)}">'
        f'<p class="toks" role="toolbar" aria-label="Tokens of the text: arrow keys move, Enter chooses">{buttons}'
        f'</p>{goes_on}<p class="told" aria-live="polite">'
        '<span class="quiet">Each token has the colour of its strongest latent. Point at one to see which fire on it; '
        "click it to keep them.</span></p></div>"
    )


def _colour(latents: Sequence[Sequence[Any]], largest: Mapping[int, float]) -> str:
    """The style of a token: the hue of its strongest latent, and how close that is to a full firing."""
    if not latents:
        return "--share:0"
    latent, value = latents[0]
    share = min(1.0, value / (largest.get(latent) or value or 1.0))
    return f"--hue:{latent * _GOLDEN % 360:.0f};--share:{share:.2f}"


def side_by_side(continuations: Sequence[tuple[str, str]]) -> str:
    """Continuations in columns; what differs from the first is marked in all others.

    Args:
        continuations (`Sequence[tuple[str, str]]`): Title and text of each, the first that of the unchanged model.
    """
    plain = _WORDS.findall(continuations[0][1])
    columns = []
    for number, (title, text) in enumerate(continuations):
        words = _WORDS.findall(text)
        body = escape(text) if number == 0 else _marked(plain, words)
        same = "" if number == 0 or words != plain else '<p class="quiet">The same as the model by itself.</p>'
        columns.append(
            f'<section><h3>{escape(title)}</h3><p class="tokens">{body or "<i>nothing</i>"}</p>{same}</section>'
        )
    return f'<div class="columns">{"".join(columns)}</div>'


def _marked(plain: Sequence[str], words: Sequence[str]) -> str:
    """A text with what is not in `plain`, in that order, marked."""
    parts = []
    for kind, _, _, start, stop in difflib.SequenceMatcher(None, plain, words, autojunk=False).get_opcodes():
        text = escape("".join(words[start:stop]))
        parts.append(f'<mark class="changed">{text}</mark>' if text.strip() and kind != "equal" else text)
    return "".join(parts)
