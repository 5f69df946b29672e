"""Compare: two SAEs, or two prunings of one, side by side."""

from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.charts import Axis, Mark, line_chart
from ..looks.messages import told
from ..subject.opened import RANKINGS
from .inputs import BARS, HEAVY, Shown, area


_ROWS = (
    ("latents", "width", ",.0f"),
    ("FVU", "fvu", ".4f"),
    ("recaptured loss", "recaptured_zero", ".4f"),
    ("cross-entropy", "ce", ".4f"),
    ("L0", "l0", ".2f"),
    ("RSA", "rsa", ".4f"),
    ("MB", "size_mb", ".2f"),
)


class CompareTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:  # noqa: ARG002
        self.endpoints = endpoints
        with gr.Row():
            self.left = self._side("A", "trained")
            self.right = self._side("B", "energy")
        self.compare = gr.Button("Compare", variant="primary")
        # Links to latents lead where they say: those of B may be of another SAE than the one that is open.
        self.outcome = area("comparison")
        self.compare.click(
            told(self.show),
            [*self.left, *self.right],
            self.outcome,
            **HEAVY,
        )

    @staticmethod
    def _side(name: str, ranking: str) -> list[Any]:
        with gr.Column(min_width=280):
            gr.Markdown(f"### {name}")
            return [
                gr.Textbox("embedded", label=f"SAE {name}: repository or folder"),
                gr.Textbox("", label="Which of its SAEs", placeholder="empty: the first"),
                gr.Radio(list(RANKINGS), value=ranking, label="Ranking"),
                gr.Number(0, precision=0, minimum=0, label="Width", info="0: all latents"),
            ]

    def show(
        self,
        sae: str,
        place: str,
        ranking: str,
        width: float | None,
        other: str,
        other_place: str,
        other_ranking: str,
        other_width: float | None,
        progress: Any = BARS,  # noqa: ARG002 (gradio draws its bars there)
    ) -> str:
        """Both sides measured, drawn and matched."""
        left = (sae, place, ranking, int(width or 0))
        right = (other, other_place, other_ranking, int(other_width or 0))
        comparison = self.endpoints.compare(*left, *right)
        curves, marks = {}, []
        for letter, side, figures in zip("AB", (left, right), comparison["figures"], strict=True):
            name = f"{letter}: {figures['sae']}, {figures['ranking']}"
            curves[name] = [(row["width"], row["fvu"]) for row in self.endpoints.curve(*side[:3]).rows]
            marks.append(Mark(name, figures["width"], figures["fvu"], letter))
        chart = line_chart(
            curves, Axis("width (latents)", log=True), Axis("fraction of variance unexplained", low=0.0), marks
        )
        figures = f"<section>{_figures(comparison['figures'])}</section>"
        return f'<div class="wide">{chart}{figures}</div>{_latents(comparison, left, right)}'


def _figures(figures: list[dict[str, Any]]) -> str:
    rows = [[title, *(html.number(one.get(key), form) for one in figures)] for title, key, form in _ROWS]
    return html.table(["", "A", "B"], rows, f"On {figures[0]['tokens']:,} held-out tokens", numbers=(1, 2))


def _latents(comparison: dict[str, Any], left: tuple, right: tuple) -> str:
    if comparison["same_sae"]:
        return _kept(comparison["kept"], left)
    different = (
        '<p class="note">These read different places or models, so their hidden states are not the same and '
        "cosines of their latents mean little.</p>"
    )
    return ("" if comparison["same_place"] else different) + _matches(comparison["matches"], left, right)


def _names(latents: list[int], side: tuple, count: int) -> str:
    names = ", ".join(html.latent_name(side[0], side[1], latent) for latent in latents)
    return (names or "none") + (f" and {count - len(latents):,} more" if count > len(latents) else "")


def _kept(kept: dict[str, Any], side: tuple) -> str:
    return (
        f"<h3>Which features survive</h3><p><b>{kept['both']:,}</b> latents are in both.</p>"
        f"<p>Only A keeps {kept['count_left']:,}: {_names(kept['only_left'], side, kept['count_left'])}</p>"
        f"<p>Only B keeps {kept['count_right']:,}: {_names(kept['only_right'], side, kept['count_right'])}</p>"
    )


def _matches(matches: dict[str, Any], left: tuple, right: tuple) -> str:
    rows = [
        [html.latent_name(*left[:2], one), html.latent_name(*right[:2], other), f"{cosine:.3f}"]
        for one, other, cosine in matches["pairs"]
    ]
    return (
        "<h3>Which features survive</h3>"
        f"<p><b>{matches['share_left']:.1%}</b> of A's latents are in B and <b>{matches['share_right']:.1%}</b> of "
        "B's in A, with a decoder cosine of at least 0.7 (mean of A's best cosines: "
        f"{matches['mean_cosine']:.3f}).</p>"
        f"<p>A's latents with none like them in B, {matches['count_alone']:,}: "
        f"{_names(matches['alone'], left, matches['count_alone'])}</p>"
        f"<h3>Matched features</h3><p>{matches['mutual']:,} pairs are each other's nearest; the most similar:</p>"
        + html.table(["A", "B", "cosine"], rows, numbers=(2,))
    )
