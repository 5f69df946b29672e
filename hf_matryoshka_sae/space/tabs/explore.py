"""Explore: the latents of an SAE as a list and as a tree; building the index they are read from."""

from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.messages import told
from ..subject.answers import SORTS
from .inputs import BARS, HEAVY, LIGHT, Shown, area


_ROWS = 40


class ExploreTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints, self.shown = endpoints, shown
        with gr.Group(visible=False) as self.without:
            gr.Markdown("### There is no feature index to read\nWhat latents fire on is read from one.")
            self.tokens = gr.Slider(10_000, 1_000_000, 200_000, step=10_000, label="Tokens of text to look at")
            self.build = gr.Button("Build the index", variant="primary")
        with gr.Row():
            self.sort = gr.Dropdown(list(SORTS), value="energy", label="Sort by", min_width=120)
            self.ascending = gr.Checkbox(False, label="smallest first", min_width=120)
            self.contains = gr.Textbox(label="Fires on a token with", placeholder="for example: def")
        self.table = area("latents")
        order = [shown.current, self.sort, self.ascending, self.contains]
        for changed in (self.sort.input, self.ascending.input, self.contains.submit, self.contains.blur):
            changed(told(self.list), order, self.table, **LIGHT)
        self.build.click(
            told(self.build_index), [shown.current, shown.opened, self.tokens], [self.without, shown.opened], **HEAVY
        )
        shown.opened.change(told(self.refresh), shown.current, [self.without, self.table], **LIGHT)

    def refresh(self, current: tuple[str, str]) -> tuple[Any, str]:
        """What the tab shows of an SAE that was just opened."""
        if self.endpoints.describe(*current)["index_tokens"] is None:
            return gr.update(visible=True), ""
        return gr.update(visible=False), self.list(current, "energy", False, "")

    def list(self, current: tuple[str, str], sort: str, ascending: bool, contains: str) -> str:
        """The table of latents."""
        rows = self.endpoints.latents(*current, sort, not ascending, contains or "", 0, _ROWS)
        cells = [
            [
                html.latent_name(*current, row["latent"], row["label"]),
                f"{row['frequency']:.3%}",
                f"{row['energy']:.3g}",
                f"{row['smallest_width']:,}",
            ]
            for row in rows
        ]
        return html.table(["latent", "fires", "energy", "in width"], cells, f"By {sort}", numbers=(1, 2, 3))

    def build_index(
        self,
        current: tuple[str, str],
        opened: dict[str, Any],
        tokens: float,
        progress: Any = BARS,  # noqa: ARG002 (gradio draws its bars there)
    ) -> Any:
        """Build the SAE's index on the page's text."""
        read_tokens = self.endpoints.build_index(*current, int(tokens))
        if read_tokens < tokens:
            gr.Info(f"The page's text has {read_tokens:,} tokens, so the index is of these.")
        return gr.update(visible=False), opened | {"index_tokens": read_tokens}
