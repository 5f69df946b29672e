"""Explore: the prefixes nested in each other as a picture, and all latents in a table; a click opens a latent."""

import json
import time
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...features.labels import read_labels
from ..endpoints import Endpoints
from ..limits import UNREACHABLE
from ..looks import html
from ..looks.chips import problem
from ..looks.messages import shows_errors
from ..subject.answers import SORTS
from .inputs import BARS, BROWSER, HEAVY, LIGHT, Shown, area


_ROWS = 1000
_MOST_BYTES = 20_000_000
_HEAD = ["latent", "fires on", "of tokens", "width"]
_NAMES = """<p class="quiet">Names are kept in your browser and shown wherever a latent is: change one on a latent's
page, or take those of a CSV (<code>latent_id,label</code>) or of Neuronpedia's export.</p>
<button type="button" class="small" data-do="save-names">Save my names as CSV</button>"""


class ExploreTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints = endpoints
        with gr.Column(visible=False) as self.without:
            gr.Markdown("### This SAE has no feature index yet\nIt says what latents fire on; the page can build one.")
            self.tokens = gr.Slider(10_000, 1_000_000, 200_000, step=10_000, label="Tokens of text to look at")
            self.build = gr.Button("Build the index", variant="primary")
            self.problem = area("index-problem")
        with gr.Row() as self.known:
            with gr.Column(scale=3, min_width=380):
                self.picture = area("explore-picture")
                self.threshold = gr.Slider(
                    0.2,
                    0.95,
                    0.6,
                    step=0.05,
                    label="A latent belongs to a parent from this score on",
                    info="Score: cosine of both latents' activations where the child fires.",
                )
            with gr.Column(scale=2, min_width=320):
                self.sort = gr.Dropdown(list(SORTS), value="energy", label="Largest first by")
                self.table = gr.Dataframe(
                    headers=_HEAD,
                    datatype=["number", "str", "str", "number"],
                    show_search="search",
                    interactive=False,
                    max_height=420,
                    column_widths=["20%", "40%", "22%", "18%"],
                    elem_id="latents",
                    label="All latents: press one to open it",
                )
                with gr.Accordion("Names of latents", open=False):
                    self.names_file = gr.UploadButton(
                        "Take names from a file", file_types=[".csv", ".tsv", ".json", ".jsonl", ".gz"], size="sm"
                    )
                    self.names = area("names")
        self._wire(shown)

    def _wire(self, shown: Shown) -> None:
        current = shown.current
        for moved in (self.threshold.release, self.threshold.input):
            moved(self.draw, [current, self.threshold], self.picture, trigger_mode="always_last", **LIGHT)
        self.sort.input(shows_errors(self.list), [current, self.sort], self.table, **LIGHT)
        self.table.select(self.pick, None, shown.latent, **LIGHT).then(
            None, shown.latent, None, js="latent => latentDrawer.openLatent(latent)", **BROWSER
        )
        self.names_file.upload(self.read_names, [current, self.names_file], self.names, **LIGHT).then(
            None, None, None, js="() => latentNames.take()"
        )
        self.build.click(self.build_index, [current, shown.opened, self.tokens], [shown.opened, self.problem], **HEAVY)
        refreshed = [self.without, self.known, self.picture, self.table, self.names]
        shown.opened.change(shows_errors(self.refresh), [current, self.sort, self.threshold], refreshed, **LIGHT)

    def refresh(self, current: tuple[str, str], sort: str, threshold: float) -> tuple[Any, ...]:
        """What the tab shows of an SAE that was just opened."""
        if self.endpoints.describe(*current)["index_tokens"] is None:
            return gr.update(visible=True), gr.update(visible=False), "", None, ""
        return (
            gr.update(visible=False),
            gr.update(visible=True),
            self.draw(current, threshold),
            self.list(current, sort),
            _NAMES,
        )

    def draw(self, current: tuple[str, str], threshold: float) -> str:
        """The picture of the prefixes, nested in each other."""
        if len(self.endpoints.describe(*current)["prefix_widths"]) < 2:
            return (
                '<p class="note">This SAE has one width, so no latent refines another: the picture needs a Matryoshka '
                "SAE, or prefix widths given when it was converted.</p>"
            )
        try:
            return html.picture(self.endpoints.picture(*current, threshold))
        except (ValueError, *UNREACHABLE) as error:
            return problem(error)

    def list(self, current: tuple[str, str], sort: str) -> list[list[Any]]:
        """The rows of the table: all latents, or those that lead by a figure where there are very many."""
        rows = self.endpoints.latents(*current, sort, count=_ROWS)
        return [
            [
                row["latent"],
                row["label"],
                f"{row['frequency']:.3%}",
                row["smallest_width"],
            ]
            for row in rows
        ]

    def pick(self, chosen: gr.SelectData) -> int:
        """The latent of a row."""
        return int(chosen.row_value[0])

    def read_names(self, current: tuple[str, str], file: str | None) -> str:
        """Names from a file, for the browser to keep."""
        try:
            if file is None or Path(file).stat().st_size > _MOST_BYTES:
                raise ValueError(f"Expected a file of names of at most {_MOST_BYTES // 10**6} MB.")
            given = read_labels(file)
        except ValueError as error:
            return problem(str(error).replace(str(file), Path(str(file)).name)) + _NAMES
        numbers = self.endpoints.library.look(*current).sae.latent_ids.tolist()
        names = {
            place: {"id": number, "name": given[number][:80]}
            for place, number in enumerate(numbers)
            if number in given
        }
        said = f"{len(names):,} of {len(numbers):,} latents got a name of the file."
        return f'<p data-names="{escape(json.dumps(names), quote=True)}">{said}</p>{_NAMES}'

    def build_index(
        self,
        current: tuple[str, str],
        view: dict[str, Any],
        tokens: float,
        progress: Any = BARS,  # noqa: ARG002 (gradio draws its bars there)
    ) -> tuple[Any, str]:
        """Build the SAE's index on the page's text; all views look at the SAE anew."""
        try:
            read_tokens = self.endpoints.build_index(*current, int(tokens))
        except (ValueError, *UNREACHABLE) as error:
            return gr.skip(), problem(error)
        if read_tokens < tokens:
            gr.Info(f"The page's text has {read_tokens:,} tokens, so the index is of these.")
        return view | {"time": time.time()}, ""
