"""Small pieces: a latent as a chip that opens it, a share as a bar, a problem. Everything that is text is escaped."""

from html import escape

from .links import latent_link


def chip(current: tuple[str, str], latent: int, label: str = "", score: float | None = None) -> str:
    """A latent as a link that opens it beside what is shown.

    Args:
        current (`tuple[str, str]`): Source and place of its SAE.
        latent (`int`): Its number.
        label (`str`, *optional*): What it is called.
        score (`float`, *optional*): How well one of it and its relative explains the other.
    """
    about = f' <span class="label" data-of="{latent}">{escape(label)}</span>'
    scored, shown = ("", "") if score is None else (f' data-score="{score:.3f}"', f" <small>{_short(score)}</small>")
    address = escape(latent_link(*current, latent), quote=True)
    return f'<a class="chip" href="{address}" data-latent="{latent}"{scored}>{latent}{about}{shown}</a>'


def bar(share: float, text: str = "", beside: float | None = None, about: str = "") -> str:
    """A share as a bar with its number.

    Args:
        share (`float`): Between 0 and 1.
        text (`str`, *optional*): What stands behind it; by default the share in percent.
        beside (`float`, *optional*): Another share, as a line across the bar.
        about (`str`, *optional*): What `beside` is, for its tooltip.
    """
    line = ""
    if beside is not None:
        line = f'<i style="--share:{min(1.0, beside):.3f}" title="{escape(about, quote=True)}"></i>'
    said = escape(text) if text else percent(share)
    full = f'<b style="--share:{min(1.0, max(0.0, share)):.3f}"></b>'
    return f'<span class="bar"><span aria-hidden="true">{full}{line}</span>{said}</span>'


def percent(share: float) -> str:
    """A share in percent, with as many digits as say something."""
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _short(score: float) -> str:
    return f"{score:.2f}".removeprefix("0")


def problem(error: Exception | str) -> str:
    """What went wrong, in the place where the result would stand; its lines stay lines, under a fixed pitch."""
    first, _, rest = str(error).partition("\n")
    lines = f'<pre tabindex="0">{escape(rest)}</pre>' if rest.strip() else ""
    return f'<div class="note problem" role="alert"><p>{escape(first)}</p>{lines}</div>'
