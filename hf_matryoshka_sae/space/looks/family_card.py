"""A latent's family as a picture to send on: what it is called, the verdict, the family nested, the address."""

import re
import textwrap
from html import escape


_HEAD, _LINE, _FOOT, _LEAST = 40, 18, 26, 620


def family_card(picture: str, title: str, verdict: str, address: str) -> str:
    """The card as SVG that stands for itself.

    Args:
        picture (`str`): The family as [`nested_picture`] draws it.
        title (`str`): What the latent is called.
        verdict (`str`): What it is, in a sentence or two.
        address (`str`): Where its page is.
    """
    blocks = re.findall(r'<svg x="(\d+)" y="\d+" width="(\d+)"', picture)
    width = max([_LEAST, *(int(x) + int(across) + 14 for x, across in blocks)])
    height = int(re.search(r'height="(\d+)"', picture)[1])  # type: ignore[index]  # its own
    lines = textwrap.wrap(verdict, width // 7)
    lines = "".join(
        f'<text x="14" y="{_HEAD + 14 + number * _LINE}" font-size="13">{escape(line)}</text>'
        for number, line in enumerate(lines)
    )
    top = _HEAD + len(lines) * _LINE + 14
    inner = re.sub(r'^(<svg [^>]*?)width="\d+"', rf'\1 x="0" y="{top}" width="{width}"', picture, count=1)
    inner = re.sub(r'viewBox="0 0 \d+', f'viewBox="0 0 {width}', inner, count=1)
    whole = top + height + _FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="nested card" width="{width}" height="{whole}" '
        f'viewBox="0 0 {width} {whole}" role="img" aria-label="{escape(title, quote=True)} and its family">'
        f'<text class="quiet" x="14" y="28" font-size="18" font-weight="700">{escape(title)}</text>{lines}{inner}'
        f'<text class="quiet" x="14" y="{whole - 10}" font-size="11">{escape(address)}</text></svg>'
    )
