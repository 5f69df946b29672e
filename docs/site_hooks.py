"""Equations of the site (see mkdocs.yml): between lines of `$$`, or as $`...`$ within a line, as on GitHub."""

import re

from latex2mathml.converter import convert


_BLOCK = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"\$`(.+?)`\$")


def on_page_markdown(markdown: str, **_) -> str:
    """A page with its equations as MathML, which browsers draw themselves."""
    markdown = _BLOCK.sub(lambda found: f'<div class="equation">{convert(found[1], display="block")}</div>', markdown)
    return _INLINE.sub(lambda found: convert(found[1]), markdown)
