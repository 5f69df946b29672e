"""Try it: what latents make of a text, and what the model writes with one of them turned up or removed."""

from html import escape
from typing import Any

import gradio as gr

from ...steering.continuation import MODES
from ..endpoints import Endpoints
from ..looks import html
from ..looks.messages import told
from .inputs import HEAVY, Shown, area
from .prune import SAMPLE


class TextTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints = endpoints
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self.text = gr.Textbox(SAMPLE, label="Your text", lines=4, max_lines=12)
            with gr.Column(scale=2, min_width=280):
                self.read = gr.Button("Show its features", variant="primary")
        self.found = area("text-features")
        with gr.Row():
            self.one = gr.Number(0, precision=0, label="One latent along the text", min_width=160)
            self.follow = gr.Button("Follow", min_width=90)
        self.along = area("along")
        gr.Markdown("### Steering: go on with a latent changed")
        with gr.Row():
            with gr.Column(min_width=240):
                self.latent = gr.Number(0, precision=0, minimum=0, label="Latent to change")
                self.mode = gr.Radio(
                    list(MODES), value="add", label="Change", info="clamp sets its value, remove is 0"
                )
            with gr.Column(min_width=240):
                self.strength = gr.Slider(
                    -4, 4, 1, step=0.1, label="Strength", info="in units of its largest activation"
                )
                self.new_tokens = gr.Slider(1, 100, 30, step=1, label="New tokens")
            with gr.Column(min_width=240):
                self.temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest token")
                self.seed = gr.Number(0, precision=0, label="Seed")
        self.steer = gr.Button("Continue both ways", variant="primary")
        self.steered = area("steered")
        self._wire(shown)

    def _wire(self, shown: Shown) -> None:
        gr.on(
            [self.read.click, self.text.submit],
            told(self.show),
            [shown.current, self.text, shown.width],
            self.found,
            **HEAVY,
        )
        gr.on(
            [self.follow.click, self.one.submit],
            told(self.show_one),
            [shown.current, self.text, shown.width, self.one],
            self.along,
            **HEAVY,
        )
        self.steer.click(
            told(self.continue_both),
            [
                shown.current,
                self.text,
                shown.width,
                self.latent,
                self.mode,
                self.strength,
                self.new_tokens,
                self.temperature,
                self.seed,
            ],
            self.steered,
            **HEAVY,
        )

    def show(self, current: tuple[str, str], text: str, width: float) -> str:
        """The strongest latents of a text and of each of its tokens."""
        features = self.endpoints.read_text(text, *current, width=self._width(current, width))
        return text_html(features, current)

    def show_one(self, current: tuple[str, str], text: str, width: float, latent: float | None) -> str:
        """One latent along the text."""
        if latent is None:
            raise ValueError("Say which latent: its number.")
        features = self.endpoints.activations(text, int(latent), *current, width=self._width(current, width))
        largest = max(features["activations"])
        shaded = html.tokens(features["tokens"], features["activations"], largest)
        return f"<p>{shaded}</p><p class=quiet>Latent {int(latent)}; its largest value here is {largest:.3g}.</p>"

    def continue_both(
        self,
        current: tuple[str, str],
        text: str,
        width: float,
        latent: float | None,
        mode: str,
        strength: float,
        new_tokens: float,
        temperature: float,
        seed: float | None,
    ) -> str:
        """The text continued as it is, and with a latent changed."""
        if latent is None:
            raise ValueError("Say which latent to change: its number.")
        continuations = self.endpoints.steer(
            text,
            int(latent),
            mode,
            strength,
            *current,
            width=self._width(current, width),
            new_tokens=int(new_tokens),
            temperature=temperature,
            seed=int(seed or 0),
        )
        change = "removed" if mode == "remove" else f"{'+' if mode == 'add' else '='} {continuations['amount']:.3g}"
        rows = [
            ["as the model is", f"<span class=tokens>{escape(continuations['plain'])}</span>"],
            [f"latent {int(latent)} {change}", f"<span class=tokens>{escape(continuations['steered'])}</span>"],
        ]
        return html.table(["", "continuation"], rows)

    def _width(self, current: tuple[str, str], width: float) -> int:
        # The slider may still have the width of the SAE that was open before.
        return min(int(width), self.endpoints.num_latents(*current))


def text_html(features: dict[str, Any], current: tuple[str, str]) -> str:
    """Latents of a text: along it, and token by token."""
    cut = f"<p class=note>{features['left_out']} tokens at the end were left out.</p>" if features["left_out"] else ""
    along = [
        [
            html.latent_name(*current, row["latent"], row["label"]),
            html.tokens(features["tokens"], row["activations"], row["max"]),
            f"{row['max']:.3g}",
        ]
        for row in features["latents"]
    ]
    by_token = [
        [
            f"<code>{escape(html.visible(token))}</code>",
            ", ".join(f"{html.latent_name(*current, latent)} ({value:.3g})" for latent, value in strongest) or "–",
        ]
        for token, strongest in zip(features["tokens"], features["top"], strict=True)
    ]
    return (
        f"{cut}<h3>Its strongest latents, of the first {features['width']:,}</h3>"
        + html.table(["latent", "along the text", "largest"], along, numbers=(2,))
        + "<h3>Token by token</h3>"
        + html.table(["token", "latents that fire (value)"], by_token)
    )
