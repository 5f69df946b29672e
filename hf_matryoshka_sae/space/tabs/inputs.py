"""What all views share: what is open, its width, its latent, and how handlers run."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.utils import get_space


@dataclass
class Shown:
    """The state of one visitor's page, which every view reads and none keeps a copy of.

    Args:
        current (`gr.State`): Source and place of the open SAE.
        opened (`gr.State`): The [`View`] that was opened last, as a dictionary; `opened.change` is the moment at which
            an SAE was opened, by link or by hand, or its index was built. Views refresh on it.
        width (`gr.Slider`): The first n latents: one for the whole page, chosen once for all views. `input` while it
            is dragged, `release` once it rests, whether by mouse, key or a click in a chart.
        latent (`gr.Number`): The latent that is open in the drawer. The page's script sets it on a click on anything
            with `data-latent`, upon which its `input` opens the drawer.
        tabs (`gr.Tabs`): The views; `selected` is one of `looks.links.TABS`.
    """

    current: gr.State
    opened: gr.State
    width: gr.Slider
    latent: gr.Number
    tabs: gr.Tabs


# How handlers run. Those that run a language model start at once too: what they were given is checked, and an SAE
# opened, before they wait in a lane for those before them (see `subject/lanes.py`).
LIGHT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 20}
HEAVY: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
BROWSER: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
"""For events that a script in the browser answers alone."""

# Gradio fills these in where a handler has them as a default: a bar for each tqdm that runs in it, or one of its own.
BARS, BAR = gr.Progress(track_tqdm=True), gr.Progress()


def area(name: str, value: str = "") -> gr.HTML:
    """Return a place for HTML. A click on a latent's link in it opens the latent in the drawer."""
    return gr.HTML(value, elem_id=name, elem_classes="space-html", js_on_load=None)


def on_a_space() -> bool:
    """Return whether this runs as a Space on the Hub, with visitors who log in there."""
    return get_space() is not None
