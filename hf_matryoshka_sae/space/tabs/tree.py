"""Tree: which latents of a wider prefix refine those of a narrower one."""

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.messages import told
from ..subject.opened import Opened
from ..subject.trees import IndexTree
from .features import opens_latents
from .inputs import Shown, area


_MOST = 1500
ABOUT = """A latent of one prefix is a child of a latent of the narrower prefix if that one does, where the child
fires, what the child does (masked cosine of at least 0.6). Unfold a family; click a latent to open it."""


class TreeTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
        feature (`gr.HTML`): Where a latent that is chosen is shown.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown, feature: gr.HTML):
        self.endpoints = endpoints
        gr.Markdown(ABOUT)
        with gr.Row():
            self.latent = gr.Textbox("", label="Only the family of this latent", placeholder="empty: all")
            self.unfolded = gr.Checkbox(False, label="unfolded")
            self.show = gr.Button("Show", min_width=90)
        self.tree = area("tree")
        gr.on(
            [self.show.click, self.latent.submit, self.unfolded.input],
            told(self.draw),
            [shown.current, self.latent, self.unfolded],
            self.tree,
            api_visibility="private",
            concurrency_limit=20,
        )
        opens_latents(self.tree, endpoints, shown, feature)

    def draw(self, current: tuple[str, str], latent: str, unfolded: bool) -> str:
        """The tree, or the family of one latent."""
        opened = self.endpoints.library.open(*current)
        latent = latent.strip()
        if latent and not (latent.isdecimal() and latent.isascii()):
            raise ValueError(f"A latent is named by its number, got '{latent[:40]}'. Leave it empty for all families.")
        return tree_html(opened, int(latent) if latent else None, unfolded)

    def refresh(self, current: tuple[str, str]) -> str:
        """What the tab shows of an SAE that was just opened."""
        opened = self.endpoints.library.open(*current)
        if opened.index is None:
            return '<p class="quiet">The tree is part of the feature index; build it on the Features tab.</p>'
        return tree_html(opened, None, False)


def tree_html(opened: Opened, latent: int | None, unfolded: bool) -> str:
    """Families of latents, each to be unfolded.

    Args:
        opened ([`Opened`]): The SAE.
        latent (`int`, *optional*): Show its family alone, unfolded down to it.
        unfolded (`bool`): Whether all is unfolded.

    Raises:
        `ValueError`: if there is no such latent, or no index.
    """
    tree = opened.tree()
    widths = opened.sae.prefix_widths
    if len(widths) < 2:
        return (
            '<p class="note">This SAE has one width, so no latent refines another: a tree needs a Matryoshka SAE, or '
            "prefix widths given when it was converted.</p>"
        )
    if latent is not None:
        tree.check(latent)
        path = [latent, *tree.ancestors(latent)]
        return f'<div class="tree">{_list(opened, tree, [path[-1]], set(path), unfolded)}</div>'
    families, parts, drawn = tree.families(), [], 0
    about = f"{tree.joined:,} of {len(tree):,} latents have a parent; {len(families):,} families."
    for level, width in enumerate(widths):
        roots = [root for root in families if tree.level[root] == level]
        chosen = []
        for root in roots:
            drawn += 1 + tree.size(root)
            if drawn > _MOST:
                break
            chosen.append(root)
        if roots:
            rest = f", the largest {len(chosen)} shown" if len(chosen) < len(roots) else ""
            parts.append(f"<h3>From width {width:,}: {len(roots)} families{rest}</h3>")
            parts.append(_list(opened, tree, chosen, set(), unfolded))
    return f'<p class="quiet">{about}</p><div class="tree">{"".join(parts)}</div>'


def _list(opened: Opened, tree: IndexTree, latents: list[int], path: set[int], unfolded: bool) -> str:
    """Latents and, folded, what is below them; no deeper than there are levels."""
    items = []
    for latent in latents:
        line = _line(opened, tree, latent)
        children = tree.children(latent)
        if not children:
            items.append(f"<li><span>{line}</span></li>")
            continue
        state = " open" if unfolded or latent in path else ""
        below = _list(opened, tree, children, path, unfolded)
        summary = f"<summary>{line} <span class=quiet>({len(children)})</span></summary>"
        items.append(f"<li><details{state}>{summary}{below}</details></li>")
    return f"<ul>{''.join(items)}</ul>"


def _line(opened: Opened, tree: IndexTree, latent: int) -> str:
    name = html.latent_name(opened.source, opened.place, latent, opened.labels[latent])
    if tree.parent[latent] < 0:
        return f"{name} <span class=quiet>{tree.frequency[latent]:.2%}</span>"
    score = tree.score(latent)
    meter = f'<meter value="{score:.3f}" aria-label="score {score:.2f}"></meter> {score:.2f}'
    return f"{name} <span class=quiet>{meter} · {tree.frequency[latent]:.2%}</span>"
