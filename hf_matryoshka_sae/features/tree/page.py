"""A tree of latents as a page: one HTML file that unfolds by mouse or keyboard and loads nothing."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .tree import LatentTree, TreeNode


_STYLE = """
:root { color-scheme: light dark; --line: #8886; --quiet: #666; --bar: #2a78d6; }
@media (prefers-color-scheme: dark) { :root { --quiet: #aaa; --bar: #6cb1ff; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
h2 { font-size: 1.05rem; margin: 1.2rem 0 .3rem; }
p { color: var(--quiet); margin: .2rem 0 .6rem; }
ul { list-style: none; margin: 0; padding: 0; }
ul ul { border-left: 1px solid var(--line); margin-left: .35rem; padding-left: .6rem; }
li > span { display: block; padding-left: 1.1rem; }
summary, li > span { overflow-wrap: anywhere; }
summary { cursor: pointer; border-radius: .25rem; }
summary:focus-visible { outline: 2px solid var(--bar); }
b { font-variant-numeric: tabular-nums; }
small { color: var(--quiet); font-variant-numeric: tabular-nums; }
meter { width: 3rem; height: .7rem; vertical-align: middle; }
button { font: inherit; margin: 0 .4rem .4rem 0; padding: .1rem .6rem; }
"""

_SCRIPT = """
const all = open => document.querySelectorAll("main details").forEach(part => { part.open = open; });
document.getElementById("open").addEventListener("click", () => all(true));
document.getElementById("close").addEventListener("click", () => all(false));
"""


def tree_page(tree: "LatentTree", labels: Mapping[int, str]) -> str:
    """Return the HTML page of a tree: by level the latents with children, then those alone.

    Args:
        tree ([`LatentTree`]): The tree.
        labels (`dict[int, str]`): Text beside latents; it is escaped.
    """
    nodes = {latent: tree.node(latent) for latent in range(len(tree))}
    sections = []
    for level in range(int(tree.level.max()) + 1):
        roots = [latent for latent in tree.roots() if nodes[latent].level == level]
        families = [latent for latent in roots if nodes[latent].children]
        alone = [latent for latent in roots if not nodes[latent].children]
        families.sort(key=lambda latent: -len(nodes[latent].children))
        sections.append(f"<h2>Level {level}: {len(families)} with children</h2>")
        sections.append(_list(tree, families, nodes, labels))
        if alone:
            sections.append(f"<details><summary>{len(alone)} alone</summary>")
            sections.append(_list(tree, alone, nodes, labels) + "</details>")
    joined = int((tree.parent >= 0).sum())
    about = (
        f"{len(tree):,} latents, {joined:,} of them below a parent (score at least {tree.threshold:g}), measured on "
        f"{tree.tokens:,} tokens. Beside each latent: its score and the share of tokens on which it fires."
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tree of latents</title>'
        f"<style>{_STYLE}</style></head><body><h1>Tree of latents</h1><p>{about}</p>"
        '<button id="open" type="button">Unfold all</button><button id="close" type="button">Fold all</button>'
        f"<main>{''.join(sections)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _list(tree: "LatentTree", latents: list[int], nodes: dict, labels: Mapping[int, str]) -> str:
    """Return latents and, folded, the latents below them; the recursion is as deep as there are levels."""
    items = []
    for latent in latents:
        line = _line(tree, nodes[latent], labels)
        children = nodes[latent].children
        if children:
            below = _list(tree, children, nodes, labels)
            items.append(
                f"<li><details><summary>{line} <small>({len(children)})</small></summary>{below}</details></li>"
            )
        else:
            items.append(f"<li><span>{line}</span></li>")
    return f"<ul>{''.join(items)}</ul>"


def _line(tree: "LatentTree", node: "TreeNode", labels: Mapping[int, str]) -> str:
    # A latent of a further SAE is named by its position in that SAE.
    source = sum(start <= node.latent for start in tree.starts) - 1
    name = f"{source}/{node.latent - tree.starts[source]}" if len(tree.starts) > 1 else str(node.latent)
    label = f" {escape(str(labels[node.latent]))}" if node.latent in labels else ""
    score = "" if node.parent is None else f' <meter value="{node.score:.3f}" title="score"></meter> {node.score:.2f}'
    return f"<b>{name}</b>{label} <small>{score} {node.frequency:.2%}</small>"
