"""What the tabs share: where they show HTML, and what is open."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.utils import get_space

from ..looks import html


@dataclass
class Shown:
    """What a visitor looks at.

    Args:
        current (`gr.State`): Source and place of the open SAE, of this visitor alone.
        latent (`gr.Number`): The feature that is open; setting it opens one.
        tabs (`gr.Tabs`): Of the page.
    """

    current: gr.State
    latent: gr.Number
    tabs: gr.Tabs


# How handlers run. Those that run a language model start at once too: what they were given is checked, and an SAE
# opened, before they wait in a lane for those before them (see `subject/lanes.py`).
LIGHT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 20}
HEAVY: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}

# Gradio fills these in where a handler has them as a default: a bar for each tqdm that runs in it, or one of its own.
BARS, BAR = gr.Progress(track_tqdm=True), gr.Progress()


def area(name: str, selects: bool = True) -> gr.HTML:
    """A place for HTML; unless `selects` is off, a click on a latent's link selects it instead of following it."""
    return gr.HTML(elem_id=name, elem_classes="space-html", js_on_load=html.SELECTS if selects else None)


def on_a_space() -> bool:
    """Whether this runs as a Space on the Hub, with visitors who log in there."""
    return get_space() is not None
