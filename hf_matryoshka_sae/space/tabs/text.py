"""Text and steer: a text coloured by latents, and how the model goes on with one or two of them changed."""

from html import escape
from typing import Any

import gradio as gr

from ...steering.continuation import MODES
from ..endpoints import Endpoints
from ..limits import UNREACHABLE
from ..looks.chips import chip, problem
from ..looks.reading import reading, side_by_side
from .drawer import Drawer
from .inputs import BROWSER, HEAVY, LIGHT, Shown, area
from .prune import SAMPLE


_TOP = 64
"""Of each token so many of its strongest latents come to the browser, which colours by any of them."""

_ASK = '<p class="quiet">Press “Read it” to see which latents fire.</p>'


class TextTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
        tab (`gr.Tab`): Around it; its label names steering where the model can write.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown, tab: gr.Tab) -> None:
        self.endpoints, self.tab = endpoints, tab
        with gr.Row(elem_classes="ask-row"):
            self.text = gr.Textbox(SAMPLE, label="Text", lines=2, max_lines=10, scale=5, min_width=260, elem_id="text")
            self.read = gr.Button("Read it", variant="primary", scale=0, min_width=110)
        self.reading = area("text-features")
        with gr.Column(elem_id="steering") as self.steering:
            gr.HTML("<h2>Steer</h2>", elem_classes="space-html", js_on_load=None)
            with gr.Row(elem_classes="ask-row"):
                self.latent = gr.Number(
                    None, precision=0, minimum=0, label="Latent", min_width=110, scale=1, elem_id="steer-latent"
                )
                self.strength = gr.Slider(
                    -4,
                    4,
                    1,
                    step=0.1,
                    label="Strength, in units of its largest activation",
                    min_width=220,
                    scale=3,
                    buttons=[],
                )
                self.rival = gr.Number(
                    None, precision=0, minimum=0, label="Against latent", min_width=110, scale=1, elem_id="steer-rival"
                )
                self.duel = gr.Button("Its parent or child", size="sm", scale=0, min_width=130)
            with gr.Accordion("How it is changed, and how the model writes", open=False), gr.Row():
                self.mode = gr.Radio(
                    list(MODES), value="add", label="Change", info="clamp sets its value, remove is 0"
                )
                self.new_tokens = gr.Slider(1, 100, 30, step=1, label="New tokens", buttons=[])
                self.temperature = gr.Slider(
                    0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest token", buttons=[]
                )
                self.seed = gr.Number(0, precision=0, label="Seed", min_width=90)
            with gr.Row():
                self.steer = gr.Button(
                    "Continue with and without it", variant="primary", scale=0, min_width=290, elem_id="steer"
                )
            self.steered = area("steered")
        self._wire(shown)

    def _wire(self, shown: Shown) -> None:
        quiet = {**HEAVY, "show_progress": "hidden"}
        reading_of = [shown.current, self.text, shown.width]
        read = gr.on(
            [self.read.click, self.text.submit],
            self.show,
            reading_of,
            self.reading,
            trigger_mode="always_last",
            js="(current, text, width) => { nested.show({text, tab: 'text'}); return [current, text, width]; }",
            **HEAVY,
        )
        shown.width.release(self.again, reading_of, self.reading, trigger_mode="always_last", **quiet)
        how = [self.mode, self.new_tokens, self.temperature, self.seed]
        steering = self.steer.click(
            self.continue_all,
            [*reading_of, self.latent, self.rival, self.strength, *how],
            self.steered,
            trigger_mode="always_last",
            js="(...asked) => nested.asked(asked)",
            **HEAVY,
        )
        self.duel.click(self.relative, [shown.current, self.latent], [self.rival, self.steered], **LIGHT)
        # What is shown belongs to what the controls say: a change clears it, and what comes too late is dropped.
        self.text.input(None, None, self.reading, js=f"() => {_ASK!r}", **BROWSER)
        fitting = f"(text, found) => nested.fitting(found, text) || {_ASK!r}"
        read.then(None, [self.text, self.reading], self.reading, js=fitting, **BROWSER)
        steering.then(None, self.steered, self.steered, js="steered => nested.answered(steered)", **BROWSER)
        controls = (self.text, self.latent, self.rival, self.strength, shown.width, *how)
        gr.on([one.input for one in controls], None, None, self.steered, js="() => nested.changed()", **BROWSER)
        refreshed = [self.tab, self.text, self.reading, self.steering, self.latent, self.rival, self.steered]
        opened = [shown.current, shown.opened]
        shown.opened.change(self.refresh, opened, refreshed, **LIGHT).then(
            self.show_linked, [*opened, shown.width], self.reading, **quiet
        )

    def connect(self, drawer: Drawer, shown: Shown) -> None:
        """Let the drawer steer the latent that it shows."""
        outputs = [shown.tabs, self.latent, self.steered]
        drawer.steer.click(
            lambda latent: (gr.update(selected="text"), latent, ""), shown.latent, outputs, **LIGHT
        ).then(None, None, None, js="() => latentDrawer.steering()", **BROWSER)

    def refresh(self, current: tuple[str, str], view: dict[str, Any]) -> tuple[Any, ...]:
        """What the tab shows of an SAE that was just opened: the text of the link, else the sample that is stored."""
        about, stored = self.endpoints.describe(*current), self.endpoints.showcase(*current)
        text, reading = view.get("text") or "", _ASK
        if not text and stored is not None:
            text, reading = stored["sample"]["text"], sample_html(stored, view.get("width") or about["num_latents"])
        label = "Text and steer" if about["generates"] else "Text"
        shows = gr.update(label=label), text or SAMPLE, reading, gr.update(visible=about["generates"])
        return *shows, None, None, ""

    def show_linked(self, current: tuple[str, str], view: dict[str, Any], width: float) -> Any:
        """The text of the link, read."""
        return self.show(current, view["text"], width) if view.get("text") else gr.skip()

    def show(self, current: tuple[str, str], text: str, width: float) -> str:
        """The strongest latents of each token of a text."""
        try:
            features = self.endpoints.read_text(text, *current, width=self._width(current, width), top=_TOP)
        except (ValueError, *UNREACHABLE) as error:
            shows = problem(error)
        else:
            shows = text_html(features, current)
        return f'<div data-of="{escape(text or "", quote=True)}">{shows}</div>'

    def again(self, current: tuple[str, str], text: str, width: float) -> Any:
        """The same at another width; the stored sample has its widths with it."""
        stored = self.endpoints.showcase(*current)
        if stored is not None and text == stored["sample"]["text"]:
            return gr.skip()
        return self.show(current, text, width)

    def relative(self, current: tuple[str, str], latent: float | None) -> tuple[Any, str]:
        """The parent of a latent, else the child that it explains best."""
        if latent is None:
            return None, problem("Name a latent first.")
        try:
            family = self.endpoints.feature(int(latent), *current)["family"]
        except (ValueError, *UNREACHABLE) as error:
            return None, problem(error)
        relatives = [*family["ancestors"][:1], *family["children"][:1]]
        if not relatives:
            return None, problem(f"Latent {int(latent)} has no parent and no children.")
        return relatives[0]["latent"], ""

    def continue_all(
        self,
        current: tuple[str, str],
        text: str,
        width: float,
        latent: float | None,
        rival: float | None,
        strength: float,
        mode: str,
        new_tokens: float,
        temperature: float,
        seed: float | None,
    ) -> str:
        """The text continued as it is, and with each of one or two latents changed."""
        columns = []
        try:
            if latent is None:
                raise ValueError("Say which latent to change: click a token above, or give its number.")
            for one in dict.fromkeys(int(number) for number in (latent, rival) if number is not None):
                written = self.endpoints.steer(
                    text,
                    one,
                    mode,
                    strength,
                    *current,
                    width=self._width(current, width),
                    new_tokens=int(new_tokens),
                    temperature=temperature,
                    seed=int(seed or 0),
                )
                sign = "+" if mode == "add" else "="
                change = "removed" if mode == "remove" else f"{sign} {written['amount']:.3g}"
                columns = columns or [("As the model is", written["plain"])]
                columns.append((f"Latent {one} {change}", written["steered"]))
        except (ValueError, *UNREACHABLE) as error:
            return problem(error)
        return side_by_side(columns)

    def _width(self, current: tuple[str, str], width: float) -> int:
        # The slider may still have the width of the SAE that was open before.
        return min(int(width), self.endpoints.num_latents(*current))


def sample_html(stored: dict[str, Any], width: int) -> str:
    """The sample that is stored with the index, at the widths at which it was read.

    Args:
        stored (`dict`): The result of `Endpoints.showcase`.
        width (`int`): The width to begin with.
    """
    sample = stored["sample"]
    written = sample["continuations"]
    return reading(
        sample["tokens"],
        dict(zip(sample["widths"], sample["firings"], strict=True)),
        {int(latent): value for latent, value in stored["largest"].items()},
        stored.get("labels", {}),
        width,
        dict(zip(sample["widths"], written, strict=True)) if written else None,
    )


def text_html(features: dict[str, Any], current: tuple[str, str]) -> str:
    """A text that was read, and its strongest latents.

    Args:
        features (`dict`): Of `Endpoints.read_text`.
        current (`tuple[str, str]`): Source and place of the SAE.
    """
    cut = f"<p class=note>{features['left_out']} tokens at the end were left out.</p>" if features["left_out"] else ""
    rows = [number for number, read in enumerate(features["read"]) if read]  # without special tokens
    firings = [features["top"][number] for number in rows]
    largest: dict[int, float] = {}
    for token in firings:
        for latent, value in token:
            largest[latent] = max(value, largest.get(latent, 0.0))
    chips = " ".join(chip(current, row["latent"], row["label"]) for row in features["latents"])
    read = reading(
        [features["tokens"][number] for number in rows],
        {features["width"]: firings},
        largest,
        features["labels"],
        features["width"],
    )
    return f'{cut}{read}<p class="chips"><span>Strongest of the first {features["width"]:,} latents</span> {chips}</p>'
