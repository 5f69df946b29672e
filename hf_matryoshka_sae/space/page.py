"""The page: what is open, its tabs, the endpoints, and links that open all of it."""

import inspect
import re
import threading
import time
from dataclasses import asdict
from typing import Any

import gradio as gr

from .endpoints import Endpoints
from .limits import UNREACHABLE, typed
from .looks.html import data, escape
from .looks.links import View
from .looks.messages import shows_errors, warn
from .looks.theme import TITLE
from .subject.library import Library
from .tabs.compare import CompareTab
from .tabs.drawer import Drawer
from .tabs.explore import ExploreTab
from .tabs.inputs import BROWSER, LIGHT, Shown, area
from .tabs.prune import PruneTab
from .tabs.search import SearchTab
from .tabs.text import TextTab
from .tabs.texts import TextsTab


WARMING = "warming"
"""Name of the thread that opens what is shown at first."""

_LIGHT = ("describe", "feature", "latents", "family")
"""Endpoints that only read an index: many at once. The others run a language model, one at a time."""

_HEAVY = ("measure", "search", "read_text", "search_texts", "activations", "reconstruct", "steer", "compare")


class Page:
    """Builds the page and holds its handlers.

    Args:
        library ([`Library`]): Opens SAEs.
        default (`str`): What is open at first.
    """

    def __init__(self, library: Library, default: str) -> None:
        self.endpoints, self.default = Endpoints(library), default
        with gr.Blocks(title=TITLE, delete_cache=(3600, 3600), analytics_enabled=False) as self.blocks:
            for name in (*_LIGHT, *_HEAVY):  # first: a handler of the same name would take it
                self._endpoint(name)
            self.about = area("about")
            with gr.Row(equal_height=True, elem_id="another"):
                self.source = gr.Textbox(
                    default, label="SAE: a repository on the Hub, a folder, or “embedded”", scale=4, min_width=240
                )
                self.place = gr.Dropdown([], label="Which of its SAEs", scale=2, min_width=160, interactive=True)
                self.open = gr.Button("Open", variant="primary", scale=0, min_width=90)
            width = gr.Slider(1, 2048, 2048, step=1, label="Width: the first n latents", elem_id="width", buttons=[])
            latent = gr.Number(None, precision=0, label="Latent", elem_id="latent", visible="hidden")
            current, opened = gr.State((default, "")), gr.State(None)
            with gr.Tabs(elem_id="views") as tabs:  # holds tabs alone: anything else in it would be counted as one
                self.shown = shown = Shown(current, opened, width, latent, tabs)
                with self._view("Prune", "prune"):
                    self.prune = PruneTab(self.endpoints, shown)
                with self._view("Explore", "explore"):
                    self.explore = ExploreTab(self.endpoints, shown)
                with self._view("Search", "search"):
                    self.search = SearchTab(self.endpoints, shown)
                with self._view("Text and steer", "text") as tab:
                    self.text = TextTab(self.endpoints, shown, tab)
                with self._view("Texts", "texts", visible=False) as texts:
                    TextsTab(self.endpoints, shown, texts)
                with self._view("Compare", "compare"):
                    self.compare = CompareTab(self.endpoints, shown, self.prune.ranking)
            self.drawer = Drawer(self.endpoints, shown)
            self.search.connect(self.drawer)
            self.text.connect(self.drawer, shown)
            self._wire()

    @staticmethod
    def _view(label: str, name: str, visible: bool = True) -> gr.Tab:
        tab = gr.Tab(label, id=name, visible=visible)
        tab.select(None, None, None, js=f"() => nested.show({{tab: '{name}'}})", **BROWSER)
        return tab

    def _endpoint(self, name: str) -> None:
        limits: dict[str, Any] = {"queue": False}  # answered at once
        if name in _HEAVY:
            limits = {"concurrency_limit": None}
        method = getattr(self.endpoints, name)
        gr.api(shows_errors(typed(method)), api_name=name, api_description=inspect.getdoc(method), **limits)

    def _wire(self) -> None:
        shown = self.shown
        everything = [self.source, self.place, self.about, shown.current, shown.width, shown.opened]
        # Not among what runs a language model: what is open already opens at once, whatever others wait for.
        options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 20}
        self.blocks.load(shows_errors(self.start), None, [*everything, shown.tabs], **options)
        gr.on(
            [self.open.click, self.source.submit], shows_errors(self.open_source), self.source, everything, **options
        )
        self.place.input(shows_errors(self.open_place), [shown.current, self.place], everything, **options)
        shown.opened.change(shows_errors(self.describe), [shown.current, shown.opened], self.about, **LIGHT)
        shown.width.change(None, shown.width, None, js="width => nested.chooseWidth(width)", **BROWSER)

    def warm(self) -> None:
        """Open what is shown at first."""
        try:
            if self.endpoints.describe(self.default)["index_tokens"] is not None:
                self.endpoints.family(0, self.default)
            self.endpoints.library.open(self.default)
        except (ValueError, *UNREACHABLE):
            pass  # the visitor is told

    # What is open

    def start(self, request: gr.Request) -> tuple[Any, ...]:
        """What the page shows at first: what its address says."""
        view, problems = View.of(request.query_params, self.default)
        for problem in problems:
            warn(f"In this link, {problem}.")
        try:
            updates = self._opened(view)
        except (ValueError, *UNREACHABLE) as error:
            if (view.sae, view.place) == (self.default, ""):
                raise
            warn(f"{error} Opening {self.default} instead.")
            view = View(self.default)
            updates = self._opened(view)
        return *updates, gr.update(selected=view.tab)

    def describe(self, current: tuple[str, str], opened: dict[str, Any]) -> str:
        """What is open, in a line, and for the page's script: all that a link to it says."""
        about = self.endpoints.describe(*current)
        place = "" if about["place"] == about["places"][0] else about["place"]
        given = opened | {"place": place, "default": self.default, "latents": about["num_latents"]}
        return data("nested-opened", given) + describe_html(about)

    def open_source(self, source: str) -> tuple[Any, ...]:
        """Open a repository or folder."""
        return self._opened(View((source or "").strip()))

    def open_place(self, current: tuple[str, str], place: str) -> tuple[Any, ...]:
        """Open another SAE of the repository."""
        return self._opened(View(current[0], place))

    def _opened(self, view: View) -> tuple[Any, ...]:
        about = self.endpoints.describe(view.sae, view.place)
        latents = about["num_latents"]
        if view.width > latents:
            warn(f"This SAE has {latents:,} latents, so the width {view.width:,} of the link is left out.")
        width = view.width if 1 <= view.width <= latents else latents
        opened = asdict(view) | {"sae": about["sae"], "place": about["place"], "time": time.time()}
        current = about["sae"], about["place"]
        return (
            about["sae"],
            gr.update(choices=about["places"], value=about["place"], interactive=len(about["places"]) > 1),
            self.describe(current, opened),
            current,
            gr.update(maximum=latents, value=width),
            opened,
        )


def describe_html(about: dict[str, Any]) -> str:
    """What is open, in a line, with what shares it and what opens another."""
    name = about["sae"] if about["sae"].count("/") < 2 else about["sae"].rstrip("/").rpartition("/")[2]
    place = "" if len(about["places"]) < 2 else f" · {about['place']}"
    layer = re.search(r"(?:layers?|h|blocks?)\.(\d+)$", about["hookpoint"] or "")
    where = f"layer {layer[1]}" if layer else str(about["hookpoint"])
    widths = ", ".join(f"{width:,}" for width in about["prefix_widths"])
    more = (
        f"{about['type']} ({about['activation']}), prefixes {widths}, at {about['hookpoint']} of {about['base_model']}"
    )
    index = "no feature index yet" if about["index_tokens"] is None else f"{_short(about['index_tokens'])} tokens"
    index = f"its feature index cannot be read: {about['index_problem']}" if about["index_problem"] else index
    return (
        f'<div class="line"><h1>{escape(name + place)}</h1>'
        f'<span title="{more}">{about["num_latents"]:,} latents, {escape(where)}, {escape(index)}</span>'
        '<button type="button" class="small" data-share>Copy link</button>'
        '<button type="button" class="small" data-toggle="another" aria-expanded="false" aria-controls="another">'
        "Open another</button></div>"
    )


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count // 1000:,}k" if count < 10_000_000 else f"{count // 10**6:,}M"


def build_demo(library: Library | None = None, default: str = "embedded", warm: bool = False) -> gr.Blocks:
    """The page, to be launched with [`launch`].

    Args:
        library ([`Library`], *optional*): Opens SAEs, and says on which text they are measured.
        default (`str`, *optional*, defaults to `"embedded"`): Repository or folder that is open at first.
        warm (`bool`, *optional*, defaults to `False`): Open it in a thread right away, so that the first visitor does
            not wait for it. Nothing else of this process may load a transformers model meanwhile.
    """
    page = Page(library or Library(), default)
    if warm:
        threading.Thread(target=page.warm, name=WARMING, daemon=True).start()
    return page.blocks
