"""What the site makes of the pages (see mkdocs.yml): equations, and tables of fields that a phone can show.

Equations stand between lines of `$$`, or as $`...`$ within a line, as on GitHub.
"""

import re

from latex2mathml.converter import convert


_BLOCK = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"\$`(.+?)`\$")


def on_page_markdown(markdown: str, **_) -> str:
    """A page with its equations as MathML, which browsers draw themselves."""
    markdown = _BLOCK.sub(lambda found: f'<div class="equation">{convert(found[1], display="block")}</div>', markdown)
    return _INLINE.sub(lambda found: convert(found[1]), markdown)


def on_page_content(html: str, page, **_) -> str:
    """The reference of fields in a box of its own, whose tables `site.css` lays out for narrow screens."""
    return f'<div class="fields">{html}</div>' if page.file.src_uri.startswith("reference/") else html
