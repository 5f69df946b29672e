"""Search: latents that fire where a pattern of tokens matches, or on words."""

from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.messages import told
from .inputs import BARS, HEAVY, LIGHT, Shown, area


EXAMPLES = (
    (r"[re `\s?\d+`]", "pattern", "numbers"),
    ("[re ` ?the`] .", "pattern", "the token after “the”"),
    (r"[re `\s?[\"'“‘]`]", "pattern", "opening and closing quotes"),
    ("[v=.] .* [v]", "pattern", "a token that came before"),
    ("return, returns", "words", "words, whole and in any case"),
)
HELP = """Patterns are regular expressions over tokens: literal text (a leading space counts), `.` any token,
`(a | b)`, repeats `+ * ? {2,3}`, look-arounds `(?<=...)`, `[v=.] ... [v]` for what comes again, and ``[re `\\d+`]``
for what a token says. A latent's cosine is that of its activations with 1 at the last token of every match."""


class SearchTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints, self.shown = endpoints, shown
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self.query = gr.Textbox(label="Pattern or words", placeholder=EXAMPLES[0][0], max_lines=6)
                self.kind = gr.Radio(["pattern", "words"], value="pattern", label="This is a")
                self.search = gr.Button("Search", variant="primary")
            with gr.Column(scale=2, min_width=280):
                gr.Examples(
                    [[query, kind] for query, kind, _ in EXAMPLES],
                    [self.query, self.kind],
                    label="Examples",
                    example_labels=[about for _, _, about in EXAMPLES],
                    api_visibility="private",
                )
                gr.Markdown(HELP)
        self.hits = area("hits")
        searched = gr.on(
            [self.search.click, self.query.submit],
            told(self.find),
            [shown.current, self.query, self.kind],
            self.hits,
            **HEAVY,
        )
        searched.then(None, [self.query, self.kind], None, js="(q, kind) => nested.show({q, kind, tab: 'search'})")
        linked = shown.opened.change(told(self.refresh), shown.opened, [self.query, self.kind, self.hits], **LIGHT)
        linked.success(told(self.find_linked), [shown.current, self.query, self.kind], self.hits, **HEAVY)

    def refresh(self, opened: dict[str, Any]) -> tuple[str, str, str]:
        """The search of a link, and no hits of the SAE before."""
        return opened["q"], opened["kind"], ""

    def find_linked(self, current: tuple[str, str], query: str, kind: str) -> str:
        """What a link searches for, if it does."""
        return self.find(current, query, kind) if query else ""

    def find(self, current: tuple[str, str], query: str, kind: str, progress: Any = BARS) -> str:  # noqa: ARG002 (gradio draws its bars there)
        """The latents that fire where the pattern matches."""
        hits = self.endpoints.search(query, kind, *current)
        if not hits:
            return '<p class="note">The text holds it, but no latent fires there.</p>'
        rows = [
            [
                html.latent_name(*current, hit["latent"], hit["label"]),
                f"{hit['cosine']:.3f}",
                f"{hit['precision']:.1%}",
                f"{hit['recall']:.1%}",
            ]
            for hit in hits
        ]
        tokens = self.endpoints.describe(*current)["tokens"]
        return html.table(
            ["latent", "cosine", "precision", "recall"],
            rows,
            f"{hits[0]['tokens_matched']:,} of {tokens:,} held-out tokens match. Precision: share of a "
            "latent's firings that match; recall: share of matches on which it fires.",
            numbers=(1, 2, 3),
        )
