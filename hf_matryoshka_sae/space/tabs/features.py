"""Features: pick a latent, by number or from a table, and see all that is known of it."""

from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.feature_page import feature_page
from ..looks.messages import told, warn
from ..subject.answers import SORTS
from .inputs import BARS, HEAVY, LIGHT, Shown, area


_ROWS = 40
_TO_VIEW = "() => document.getElementById('feature')?.scrollIntoView({block: 'nearest', behavior: 'smooth'})"


class FeaturesTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open; its `latent` is placed here.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints, self.shown = endpoints, shown
        with gr.Group(visible=False) as self.without:
            gr.Markdown("### There is no feature index to read\nWhat latents fire on is read from one.")
            self.tokens = gr.Slider(10_000, 1_000_000, 200_000, step=10_000, label="Tokens of text to look at")
            self.build = gr.Button("Build the index", variant="primary")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    shown.latent.render()
                    self.open = gr.Button("Open", scale=1, min_width=90)
                with gr.Row():
                    self.sort = gr.Dropdown(list(SORTS), value="energy", label="Sort by", min_width=120)
                    self.ascending = gr.Checkbox(False, label="smallest first", min_width=120)
                self.contains = gr.Textbox(label="Fires on a token with", placeholder="for example: def")
                self.table = area("latents")
                with gr.Row():
                    self.back = gr.Button("Previous", size="sm", min_width=90)
                    self.page = gr.Number(1, precision=0, minimum=1, label="Page", min_width=90)
                    self.forth = gr.Button("Next", size="sm", min_width=90)
            with gr.Column(scale=4, min_width=280):
                self.feature = area("feature")
        self._wire()

    def _wire(self) -> None:
        order = [self.shown.current, self.sort, self.ascending, self.contains, self.page]
        opening = gr.on(
            [self.open.click, self.shown.latent.submit],
            told(self.show),
            [self.shown.current, self.shown.latent],
            self.feature,
            **LIGHT,
        )
        opening.then(None, self.shown.latent, None, js="latent => showInLink({latent, tab: 'features'}, true)")
        for changed in (self.sort.input, self.ascending.input, self.contains.submit, self.contains.blur):
            changed(lambda: 1, None, self.page, **LIGHT).then(told(self.list), order, self.table, **LIGHT)
        self.page.submit(told(self.list), order, self.table, **LIGHT)
        for button, step in ((self.back, -1), (self.forth, 1)):
            button.click(lambda page, step=step: max(1, int(page or 1) + step), self.page, self.page, **LIGHT).then(
                told(self.list), order, self.table, **LIGHT
            )
        self.built = self.build.click(
            told(self.build_index),
            [self.shown.current, self.tokens],
            self.without,
            **HEAVY,
        )
        for place in (self.table, self.feature):
            opens_latents(place, self.endpoints, self.shown, self.feature)

    def show(self, current: tuple[str, str], latent: float | None) -> str:
        """A latent's page."""
        if latent is None:
            raise ValueError("Say which latent: its number.")
        return latent_html(self.endpoints, current, int(latent))

    def refresh(self, current: tuple[str, str], latent: float | None) -> tuple[Any, str, str]:
        """What the tab shows of an SAE that was just opened."""
        about = self.endpoints.describe(*current)
        if about["index_tokens"] is None:
            return gr.update(visible=True), "", '<p class="quiet">There is no index to read from.</p>'
        number = int(latent or 0)
        if number >= about["num_latents"]:
            warn(f"This SAE has latents 0 to {about['num_latents'] - 1}, so there is no latent {number}.")
            number = 0
        return gr.update(visible=False), self.list(current, "energy", False, "", 1), self.show(current, number)

    def list(self, current: tuple[str, str], sort: str, ascending: bool, contains: str, page: float | None) -> str:
        """The table of latents."""
        page = max(1, int(page or 1))
        rows = self.endpoints.latents(*current, sort, not ascending, contains or "", (page - 1) * _ROWS, _ROWS)
        return latents_table(rows, current, f"Page {page}: latents by {sort}, and the tokens they fire on")

    def build_index(self, current: tuple[str, str], tokens: float, progress: Any = BARS) -> Any:  # noqa: ARG002 (gradio draws its bars there)
        """Build the SAE's index on the page's text."""
        read_tokens = self.endpoints.build_index(*current, int(tokens))
        if read_tokens < tokens:
            gr.Info(f"The page's text has {read_tokens:,} tokens, so the index is of these.")
        return gr.update(visible=False)


def latent_html(endpoints: Endpoints, current: tuple[str, str], latent: int) -> str:
    """A latent's page; raises `ValueError` if there is none."""
    feature, family = endpoints.feature(latent, *current), endpoints.family(latent, *current)
    return feature_page(feature, family["below"], endpoints.describe(*current)["prefix_widths"], current)


def opens_latents(place: gr.HTML, endpoints: Endpoints, shown: Shown, feature: gr.HTML) -> None:
    """Links to latents in `place` open the latent on the Features tab."""

    def open_latent(current: tuple[str, str], chosen: gr.SelectData) -> tuple[Any, int, str]:
        """Open the latent that was selected."""
        latent = int(chosen.index)
        return gr.update(selected="features"), latent, latent_html(endpoints, current, latent)

    place.select(
        told(open_latent),
        shown.current,
        [shown.tabs, shown.latent, feature],
        **LIGHT,
    ).then(None, shown.latent, None, js="latent => showInLink({latent, tab: 'features'}, true)").then(
        None, None, None, js=_TO_VIEW
    )


def latents_table(rows: list[dict[str, Any]], current: tuple[str, str], caption: str) -> str:
    """Latents, one a row."""
    if not rows:
        return '<p class="quiet">No more latents here. Go back a page, or look for something else.</p>'
    cells = [
        [
            html.latent_name(*current, row["latent"], row["label"]),
            f"{row['frequency']:.3%}",
            f"{row['energy']:.3g}",
            f"{row['smallest_width']:,}",
        ]
        for row in rows
    ]
    return html.table(["latent", "fires", "energy", "in width"], cells, caption, numbers=(1, 2, 3))
