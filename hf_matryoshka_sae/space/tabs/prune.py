"""Prune: how much of an SAE is kept, what that is worth, and taking it along."""

import tempfile
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from ..endpoints import Curve, Endpoints
from ..looks import html
from ..looks.charts import Axis, Mark, line_chart
from ..looks.messages import told, warn
from ..subject.opened import RANKINGS
from .inputs import BAR, BARS, HEAVY, LIGHT, Shown, area, on_a_space


SAMPLE = "The module defines a function that returns the number of items in the list."
_ROWS = (
    ("latents", "width", ",.0f"),
    ("FVU: fraction of variance unexplained", "fvu", ".4f"),
    ("recaptured loss (zero ablation)", "recaptured_zero", ".4f"),
    ("recaptured loss (mean ablation)", "recaptured_mean", ".4f"),
    ("cross-entropy, nats per token", "ce", ".4f"),
    ("KL to the plain model, nats", "kl", ".4f"),
    ("L0: latents that fire per token", "l0", ".2f"),
    ("RSA (Spearman)", "rsa", ".4f"),
    ("latents that never fire", "dead", ".2%"),
    ("size in MB", "size_mb", ".2f"),
)


class PruneTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints, self.shown = endpoints, shown
        self.scratch = tempfile.TemporaryDirectory(prefix="hf_matryoshka_sae-")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.k = gr.Slider(1, 64, 16, step=1, label="k: latents per token", visible=False)
                self.ranking = gr.Radio(
                    list(RANKINGS),
                    value="trained",
                    label="Ranking: which latents come first",
                    info="A Matryoshka SAE is sorted within its prefixes.",
                )
                self.measure = gr.Button("Measure this width", variant="primary")
                self.whole_curve = gr.Button("Measure the loss along the curve")
            with gr.Column(scale=3, min_width=280):
                self.chart = area("chart")
        self.figures = area("figures")
        gr.Markdown("### The same text, at this width")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.text = gr.Textbox(SAMPLE, label="Text", lines=3, max_lines=8)
                self.read = gr.Button("Reconstruct and continue")
            with gr.Column(scale=3, min_width=280):
                self.reconstructed = area("reconstructed")
        gr.Markdown("### Take it along")
        with gr.Row():
            with gr.Column(min_width=280):
                self.export = gr.Button("Make a download of this pruning")
                self.file = gr.File(label="The pruned SAE, for AutoModel.from_pretrained", interactive=False)
            with gr.Column(min_width=280):
                self.repo = gr.Textbox(label="or push it to your repository", placeholder="your-name/pruned-sae")
                if on_a_space():
                    gr.LoginButton()
                    self.token = gr.State("")
                else:
                    self.token = gr.Textbox(
                        label="Token with write access (empty: the one this machine is logged in with)",
                        type="password",
                    )
                self.private = gr.Checkbox(True, label="private")
                self.push = gr.Button("Push to the Hub")
                self.pushed = gr.Markdown()
        self._wire()

    def _wire(self) -> None:
        pruning = [self.shown.current, self.ranking, self.shown.width, self.k]
        outcome = [self.chart, self.figures]
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        # By hand alone: while another SAE is being opened, a slider has the value of the one before.
        for moved in (self.shown.width.input, self.k.input):
            moved(told(self.show), pruning, outcome, trigger_mode="always_last", **quick)
        for chosen in (self.shown.width.release, self.k.release, self.ranking.input, self.measure.click):
            chosen(told(self.show_measured), pruning, outcome, trigger_mode="always_last", **HEAVY)
        self.whole_curve.click(told(self.measure_curve), pruning, outcome, **HEAVY)
        opened = self.shown.opened.change(
            told(self.refresh), [self.shown.current, self.shown.opened], [self.ranking, self.k], **LIGHT
        )
        opened.success(told(self.show_measured), pruning, outcome, **HEAVY)
        self.k.input(None, self.k, None, js="k => nested.show({k})")
        self.ranking.input(None, self.ranking, None, js="ranking => nested.show({ranking})")
        gr.on(
            [self.read.click, self.text.submit],
            told(self.reconstruct),
            [*pruning, self.text],
            self.reconstructed,
            **HEAVY,
        )
        self.export.click(told(self.make_download), pruning, self.file, **HEAVY)
        pushing = self.push_logged_in if on_a_space() else self.push_with_token
        self.push.click(told(pushing), [*pruning, self.repo, self.token, self.private], self.pushed, **HEAVY)

    def refresh(self, current: tuple[str, str], opened: dict[str, Any]) -> tuple[str, Any]:
        """What the controls say of an SAE that was just opened."""
        about = self.endpoints.describe(*current)
        k = about["k"]
        if k is None:
            return opened["ranking"], gr.update(visible=False)
        most = min(about["num_latents"], 4 * int(k))
        if opened["k"] > most:
            warn(f"k goes up to {most} here, so the k of the link, {opened['k']:,}, is left out.")
        chosen = opened["k"] if 1 <= opened["k"] <= most else k
        return opened["ranking"], gr.update(maximum=most, value=chosen, visible=True)

    # What is measured

    def _chosen(self, current: tuple[str, str], ranking: str, width: int, k: int) -> tuple[str, str, str, int, int]:
        # A slider may still have the width of the SAE that was open before.
        return *current, ranking, min(int(width), self.endpoints.num_latents(*current)), int(k)

    def show(self, current: tuple[str, str], ranking: str, width: int, k: int) -> tuple[str, str]:
        """The curve with a marker, and the figures where they are known."""
        return curve_html(self.endpoints.curve(*self._chosen(current, ranking, width, k)))

    def show_measured(
        self,
        current: tuple[str, str],
        ranking: str,
        width: int,
        k: int,
        progress: Any = BARS,  # noqa: ARG002 (gradio draws its bars there)
    ) -> tuple[str, str]:
        """The same, measured."""
        chosen = self._chosen(current, ranking, width, k)
        return curve_html(self.endpoints.curve(*chosen, measure=[chosen[3]]))

    def measure_curve(
        self, current: tuple[str, str], ranking: str, width: int, k: int, progress: Any = BAR
    ) -> Iterator[tuple[str, str]]:
        """Measure every width of the curve, showing each as it comes."""
        chosen = self._chosen(current, ranking, width, k)
        widths = [row["width"] for row in self.endpoints.curve(*chosen).rows]
        for number, one in enumerate(widths):
            progress((number, len(widths)), desc=f"width {one}")
            yield curve_html(self.endpoints.curve(*chosen, measure=[one]))

    def reconstruct(self, current: tuple[str, str], ranking: str, width: int, k: int, text: str) -> str:
        """A text as this pruning leaves it."""
        chosen = self._chosen(current, ranking, width, k)
        return reconstructed_text(self.endpoints.reconstruct(text, *chosen), chosen[3])

    # Taking it along

    def make_download(self, current: tuple[str, str], ranking: str, width: int, k: int) -> str:
        """A zip file with the pruned SAE."""
        return self.endpoints.download(*self._chosen(current, ranking, width, k), folder=self.scratch.name)

    def push_with_token(
        self, current: tuple[str, str], ranking: str, width: int, k: int, repo: str, token: str, private: bool
    ) -> str:
        """Push the pruned SAE to a repository."""
        chosen = self._chosen(current, ranking, width, k)
        name, address = self.endpoints.push(chosen, repo, (token or "").strip() or None, private)
        return f"Pushed: [{name}]({address})"

    def push_logged_in(
        self,
        current: tuple[str, str],
        ranking: str,
        width: int,
        k: int,
        repo: str,
        token: str,  # noqa: ARG002 (the field is an input of the other way to push)
        private: bool,
        visitor: gr.OAuthToken | None = None,
    ) -> str:
        """Push the pruned SAE to a repository of the visitor who is logged in."""
        if visitor is None:
            raise ValueError("Log in with Hugging Face first: the button is above.")
        return self.push_with_token(current, ranking, width, k, repo, visitor.token, private)


def curve_html(curve: Curve) -> tuple[str, str]:
    """FVU and, where it was measured, recaptured loss against width, a marker at the pruning; and its figures."""
    return f'<div class="wide">{_panel(curve, "fvu")}{_panel(curve, "recaptured_zero")}</div>', _figures(curve)


def _panel(curve: Curve, key: str) -> str:
    """One curve; the place of a width that was not measured is read off it."""
    rows, width = curve.rows, curve.pruning.width
    points = [(row["width"], row[key]) for row in rows if row.get(key) is not None]
    marks = []
    if curve.figures is not None and curve.figures[key] is not None:
        value = curve.figures[key]
        marks = [Mark("", width, value, f"{width:,}: {value:.4f}")]
        points = sorted({*points, (width, value)})
    elif len(points) > 1 and key == "fvu":
        value = _between(points, width)
        marks = [Mark("", width, value, f"{width:,}: about {value:.2f}")]
    axis = Axis("fraction of variance unexplained", low=0.0)
    if key == "recaptured_zero":
        low = min([0.9, *(value for _, value in points)])
        axis = Axis("recaptured loss (zero ablation)", low=low, high=1.0)
    widths = Axis("width (latents)", log=True, low=rows[0]["width"], high=rows[-1]["width"])
    return line_chart({"": points}, widths, axis, marks)


def _between(points: list[tuple[int, float]], width: int) -> float:
    """The value at a width, on straight lines between the points."""
    return float(np.interp(width, *zip(*sorted(points), strict=True)))


def _figures(curve: Curve) -> str:
    """The figures of a pruning beside those of the whole SAE."""
    pruning, here, full = curve.pruning, curve.figures, curve.whole or {}
    if here is None:
        return '<p class="quiet">Let the slider go, or press “Measure this width”, to see what it is worth.</p>'
    rows = [
        [title, html.number(here[key], form), html.number(full.get(key), form), _share(here, full, key)]
        for title, key, form in _ROWS
    ]
    about = f"{pruning.ranking} ranking" + (f", k = {pruning.k}" if pruning.k else "")
    command = escape(curve.command)
    same = f"<p class=quiet>The same from the shell: <code>{command}</code></p>" if command else ""
    measured_on = f"On {here['tokens']:,} held-out tokens at <code>{escape(curve.hookpoint)}</code>."
    head = ["", f"{pruning.width:,} latents, {about}", "all latents", "share"]
    return f'{html.table(head, rows, numbers=(1, 2, 3))}<p class="quiet">{measured_on}</p>{same}'


def _share(here: dict[str, Any], full: dict[str, Any], key: str) -> str:
    if key not in ("width", "recaptured_zero", "recaptured_mean", "l0", "rsa", "size_mb") or not full.get(key):
        return ""
    return html.number(here[key] / full[key], ".1%") if here[key] is not None else ""


def reconstructed_text(text: dict[str, Any], width: int) -> str:
    """A text shaded by what each token lost, and both continuations."""
    lost = [float("nan") if value is None else value for value in text["lost"]]
    finite = [abs(value) for value in lost if value == value]
    shaded = html.tokens(text["tokens"], lost, max([1.0, *finite]))
    facts = (
        f"<ul class=facts><li>loss <b>{html.number(text['ce'], '.3f')}</b> → "
        f"<b>{html.number(text['spliced_ce'], '.3f')}</b> nats per token</li>"
        f"<li>FVU of this text <b>{html.number(text['fvu'], '.3f')}</b></li>"
        f"<li>L0 <b>{text['l0']:.1f}</b></li></ul>"
    )
    cut = f"<p class=note>{text['left_out']} tokens at the end were left out.</p>" if text["left_out"] else ""
    rows = [
        ["the model goes on", f"<span class=tokens>{escape(text['plain'])}</span>"],
        [f"with {width:,} latents", f"<span class=tokens>{escape(text['spliced'])}</span>"],
    ]
    return (
        f"<p>{shaded}</p><p class=quiet>Shaded: tokens that became harder to predict (orange) or easier (blue).</p>"
        f"{facts}{cut}{html.table(['', 'continuation'], rows)}"
    )
