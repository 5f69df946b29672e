"""Texts: paste some, ask, see which answer and because of which latents. For SAEs of sentence embeddings."""

from html import escape
from typing import Any

import gradio as gr

from ...activations.sentences import SENTENCE_EMBEDDING
from ..endpoints import Endpoints
from ..limits import UNREACHABLE
from ..looks.chips import bar, chip, problem
from .inputs import BARS, BROWSER, HEAVY, LIGHT, Shown, area


SAMPLE = """Rivers flooded the valley after a week of rain.
The orchestra tuned before the concert began.
Interest rates were raised by a quarter of a point.
A new bridge carries trains over the estuary.
She practised the violin every evening.
The central bank expects inflation to fall.
Heavy storms are forecast for the coast."""
_QUERY = "music"
_CLEAR = "() => ''"


class TextsTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
        tab (`gr.Tab`): That it is in; seen only where the open SAE reads embeddings of whole texts.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown, tab: gr.Tab) -> None:
        self.endpoints = endpoints
        self.texts = gr.Textbox(SAMPLE, label="Texts, one in each line", lines=7, max_lines=14, elem_id="texts")
        with gr.Row(elem_classes="ask-row"):
            self.query = gr.Textbox(_QUERY, label="What to look for", scale=5, min_width=260)
            self.search = gr.Button("Search", variant="primary", scale=0, min_width=130)
        self.hits = area("text-hits")
        asked = [shown.current, self.texts, self.query, shown.width]
        searching = gr.on(
            [self.search.click, self.query.submit], self.find, asked, self.hits, trigger_mode="always_last", **HEAVY
        )
        shown.width.release(self.again, [*asked, self.hits], self.hits, trigger_mode="always_last", **HEAVY)
        # What was found belongs to what was asked: a change clears it, and stops what is under way.
        for changed in (self.texts.input, self.query.input):
            changed(None, None, self.hits, js=_CLEAR, cancels=[searching], **BROWSER)
        shown.opened.change(self.refresh, shown.current, [tab, self.hits], **LIGHT)

    def refresh(self, current: tuple[str, str]) -> tuple[Any, str]:
        """Show the tab where the SAE that was just opened reads embeddings of whole texts."""
        return gr.update(visible=self.endpoints.describe(*current)["hookpoint"] == SENTENCE_EMBEDDING), ""

    def again(self, current: tuple[str, str], texts: str, query: str, width: float, hits: str) -> Any:
        """The same at another width, where something was found."""
        return self.find(current, texts, query, width) if hits else gr.skip()

    def find(
        self,
        current: tuple[str, str],
        texts: str,
        query: str,
        width: float,
        progress: Any = BARS,  # noqa: ARG002 (gradio draws its bars there)
    ) -> str:
        """The texts that answer, as HTML; or what is wrong."""
        try:
            width = min(int(width), self.endpoints.num_latents(*current))  # the slider may have that of another SAE
            hits = self.endpoints.search_texts(texts, query, *current, width)
        except (ValueError, *UNREACHABLE) as error:
            return problem(error)
        return hits_html(hits, current, query, width)


def hits_html(hits: list[dict[str, Any]], current: tuple[str, str], query: str, width: int) -> str:
    """Texts best first, each with the latents that answered and their share of its score."""
    if not hits:
        return f'<p class="note">Of {width:,} latents none that fires on a text answers “{escape(query)}”.</p>'
    rows = []
    for hit in hits:
        latents = "".join(
            f"<li>{chip(current, latent, words)} {bar(share)}</li>" for latent, words, share in hit["latents"]
        )
        rows.append(
            f"<tr><td>{escape(hit['text'])}</td><td class=number>{hit['score']:.3f}</td>"
            f'<td><ul class="answers">{latents}</ul></td></tr>'
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Texts found"><table class="hits"><caption>'
        f"Texts by their cosine with “{escape(query)}”, by the first {width:,} latents. It is a sum over them: beside "
        "each its share, and what it stands for: of few texts the one on which it is largest, of many the words that "
        "such texts have in common.</caption><thead><tr>"
        "<th scope=col>text</th><th scope=col class=number>cosine</th><th scope=col>latents that answered</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
