"""A tree of latents as a page: the picture of nested prefixes in one HTML file that loads nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .picture import nested_picture


if TYPE_CHECKING:
    from .tree import LatentTree


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
main { overflow-x: auto; padding: 3px; }
output { background: Canvas; bottom: 0; display: block; min-height: 1.5em; padding: .3rem 0; position: sticky; }
"""

# Arrows walk in the tree; what is in focus or under the pointer is told in full
_SCRIPT = """
const blocks = [...document.querySelectorAll(".block")], told = document.querySelector("output");
const of = latent => blocks.find(block => block.dataset.latent === latent);
const below = block => blocks.filter(other => other.dataset.parent === block.dataset.latent);
const beside = block => block.dataset.parent ? below(of(block.dataset.parent)) : blocks.filter(b => !b.dataset.parent);
const next = {
  ArrowUp: block => of(block.dataset.parent), ArrowDown: block => below(block)[0],
  ArrowLeft: block => beside(block)[beside(block).indexOf(block) - 1],
  ArrowRight: block => beside(block)[beside(block).indexOf(block) + 1],
};
for (const block of blocks) {
  const tell = () => { told.textContent = block.querySelector("title").textContent; };
  block.addEventListener("focus", tell);
  block.addEventListener("pointerenter", tell);
  block.addEventListener("click", event => { event.preventDefault(); block.focus(); });
  block.addEventListener("keydown", event => {
    const other = next[event.key]?.(block);
    if (other) { event.preventDefault(); other.focus(); }
  });
}
"""


def tree_page(tree: "LatentTree", labels: Mapping[int, str], most: int = 1500) -> str:
    """Return the HTML page of a tree.

    Args:
        tree ([`LatentTree`]): The tree.
        labels (`Mapping[int, str]`): Text beside latents; it is escaped.
        most (`int`, *optional*, defaults to 1500): Number of latents that are drawn at most, of the largest families.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tree of latents</title>'
        f"<style>{_STYLE}</style></head><body><h1>Tree of latents</h1><p>Each row is a prefix. A block lies under the "
        "latent that it refines; the darker, the better that latent explains it. Measured on "
        f"{tree.tokens:,} tokens.</p><main>{nested_picture(tree, labels, most=most, alone=True)}</main>"
        f"<output></output><script>{_SCRIPT}</script></body></html>\n"
    )
