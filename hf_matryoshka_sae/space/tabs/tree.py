"""Tree: which latents of a wider prefix refine those of a narrower one."""

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.messages import told
from ..subject.trees import Branch, Families
from .features import opens_latents
from .inputs import LIGHT, Shown, area


ABOUT = """A latent of one prefix is a child of a latent of the narrower prefix if that one does, where the child
fires, what the child does (masked cosine of at least 0.6). Unfold a family; click a latent to open it."""
_NO_TREE = (
    '<p class="note">This SAE has one width, so no latent refines another: a tree needs a Matryoshka SAE, or '
    "prefix widths given when it was converted.</p>"
)


class TreeTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
        feature (`gr.HTML`): Where a latent that is chosen is shown.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown, feature: gr.HTML) -> None:
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
            **LIGHT,
        )
        opens_latents(self.tree, endpoints, shown, feature)

    def draw(self, current: tuple[str, str], latent: str, unfolded: bool) -> str:
        """The tree, or the family of one latent."""
        latent = latent.strip()
        if latent and not (latent.isdecimal() and latent.isascii()):
            raise ValueError(f"A latent is named by its number, got '{latent[:40]}'. Leave it empty for all families.")
        if len(self.endpoints.describe(*current)["prefix_widths"]) < 2:
            return _NO_TREE
        if not latent:
            return families_html(self.endpoints.families(*current), current, unfolded)
        path = [int(latent), *self.endpoints.family(int(latent), *current)["ancestors"]]
        branch = self.endpoints.branch(path[-1], *current)
        return f'<div class="tree">{_list([branch], current, set(path), unfolded)}</div>'

    def refresh(self, current: tuple[str, str]) -> str:
        """What the tab shows of an SAE that was just opened."""
        if self.endpoints.describe(*current)["index_tokens"] is None:
            return '<p class="quiet">The tree is part of the feature index; build it on the Features tab.</p>'
        return self.draw(current, "", False)


def families_html(families: Families, current: tuple[str, str], unfolded: bool) -> str:
    """Families of latents, each to be unfolded."""
    count = sum(count for _, count, _ in families.levels)
    parts = []
    for width, here, largest in families.levels:
        rest = f", the largest {len(largest)} shown" if len(largest) < here else ""
        parts.append(f"<h3>From width {width:,}: {here} families{rest}</h3>")
        parts.append(_list(largest, current, set(), unfolded))
    about = f"{families.joined:,} of {families.latents:,} latents have a parent; {count:,} families."
    return f'<p class="quiet">{about}</p><div class="tree">{"".join(parts)}</div>'


def _list(branches: list[Branch], current: tuple[str, str], path: set[int], unfolded: bool) -> str:
    """Latents and, folded, what is below them; no deeper than there are levels."""
    items = []
    for branch in branches:
        line = _line(branch, current)
        if not branch.children:
            items.append(f"<li><span>{line}</span></li>")
            continue
        state = " open" if unfolded or branch.latent in path else ""
        below = _list(branch.children, current, path, unfolded)
        summary = f"<summary>{line} <span class=quiet>({len(branch.children)})</span></summary>"
        items.append(f"<li><details{state}>{summary}{below}</details></li>")
    return f"<ul>{''.join(items)}</ul>"


def _line(branch: Branch, current: tuple[str, str]) -> str:
    name = html.latent_name(*current, branch.latent, branch.label)
    if branch.score is None:
        return f"{name} <span class=quiet>{branch.frequency:.2%}</span>"
    meter = f'<meter value="{branch.score:.3f}" aria-label="score {branch.score:.2f}"></meter> {branch.score:.2f}'
    return f"{name} <span class=quiet>{meter} · {branch.frequency:.2%}</span>"
