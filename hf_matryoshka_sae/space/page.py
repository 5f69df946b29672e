"""The page: what is open, six tabs, the endpoints, and links that open all of it."""

import inspect
import threading
from typing import Any

import gradio as gr

from .endpoints import Endpoints
from .limits import UNREACHABLE, typed
from .looks.html import escape
from .looks.links import View
from .looks.messages import told, warn
from .subject.library import Library
from .tabs.compare import CompareTab
from .tabs.features import FeaturesTab
from .tabs.inputs import HEAVY, LIGHT, Shown, area
from .tabs.prune import PruneTab
from .tabs.search import SearchTab
from .tabs.text import TextTab
from .tabs.tree import TreeTab


TITLE = "Matryoshka SAEs: prune a dictionary, look at its features"
WARMING = "warming"
"""Name of the thread that opens what is shown at first."""

_LIGHT = ("describe", "feature", "latents", "family")
"""Endpoints that only read an index: many at once. The others run a language model, one at a time."""

_HEAVY = ("measure", "search", "read_text", "activations", "reconstruct", "steer", "compare")


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
            gr.Markdown(f"# {TITLE}")
            with gr.Row(equal_height=True):
                self.source = gr.Textbox(
                    default, label="SAE: a repository on the Hub, a folder, or “embedded”", scale=4, min_width=240
                )
                self.place = gr.Dropdown([], label="Which of its SAEs", scale=2, min_width=160, interactive=True)
                self.open = gr.Button("Open", variant="primary", scale=1, min_width=90)
            self.about = area("about")
            latent = gr.Number(0, precision=0, label="Latent", scale=2, min_width=110, render=False)
            current = gr.State((default, ""))
            with gr.Tabs() as tabs:  # holds tabs alone: anything else in it would be counted as one
                self.shown = Shown(current, latent, tabs)
                with gr.Tab("Prune", id="prune") as first:
                    self.prune = PruneTab(self.endpoints, self.shown)
                with gr.Tab("Features", id="features") as second:
                    self.features = FeaturesTab(self.endpoints, self.shown)
                with gr.Tab("Search", id="search") as third:
                    self.search = SearchTab(self.endpoints, self.shown, self.features.feature)
                with gr.Tab("Tree", id="tree") as fourth:
                    self.tree = TreeTab(self.endpoints, self.shown, self.features.feature)
                with gr.Tab("Try it", id="try") as fifth:
                    self.text = TextTab(self.endpoints, self.shown, self.features.feature)
                with gr.Tab("Compare", id="compare") as sixth:
                    self.compare = CompareTab(self.endpoints)
            for tab in (first, second, third, fourth, fifth, sixth):
                tab.select(None, None, None, js=f"() => showInLink({{tab: '{tab.id}'}})")
            self._wire()

    def _endpoint(self, name: str) -> None:
        limits: dict[str, Any] = {"queue": False}  # answered at once
        if name in _HEAVY:
            limits = {"concurrency_limit": None}
        method = getattr(self.endpoints, name)
        gr.api(told(typed(method)), api_name=name, api_description=inspect.getdoc(method), **limits)

    def _wire(self) -> None:
        everything = [
            self.source,
            self.place,
            self.about,
            self.shown.current,
            self.prune.width,
            self.prune.k,
            self.prune.ranking,
            self.text.width,
            *self.compare.left[:2],
            *self.compare.right[:2],
            self.compare.right[3],
        ]
        # Not among what runs a language model: what is open already opens at once, whatever others wait for.
        options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 20}
        first = [*everything, self.shown.tabs, self.shown.latent, self.search.query, self.search.kind]
        started = self.blocks.load(told(self.start), None, first, **options)
        started.success(None, [self.source, self.place], None, js="(sae, place) => showInLink({sae, place})")
        opened = [
            gr.on([self.open.click, self.source.submit], told(self.open_source), self.source, everything, **options),
            self.place.input(told(self.open_place), [self.shown.current, self.place], everything, **options),
        ]
        for event in opened:
            step = "(sae, place) => showInLink({sae, place, latent: null}, true)"
            event.success(None, [self.source, self.place], None, js=step)
        current = self.shown.current
        search = [current, self.search.query, self.search.kind]
        started.success(told(self.search.find_linked), search, self.search.hits, **HEAVY)
        built = self.features.built.success(told(self.describe), current, self.about, **LIGHT)
        pruning = [current, self.prune.ranking, self.prune.width, self.prune.k]
        indexed = [self.features.without, self.features.table, self.features.feature]
        for event in (built, started, *opened):
            refreshed = event.success(
                told(self.features.refresh), [current, self.shown.latent], indexed, **LIGHT
            ).then(told(self.tree.refresh), current, self.tree.tree, **LIGHT)
            if event is not built:
                measured = [self.prune.chart, self.prune.figures]
                refreshed.then(told(self.prune.show_measured), pruning, measured, **HEAVY)

    def warm(self) -> None:
        """Open what is shown at first, and measure what of it is shown at first."""
        try:
            if self.endpoints.describe(self.default)["index_tokens"] is not None:
                self.endpoints.family(0, self.default)
            self.endpoints.curve(self.default, measure=[0])
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
        return *updates, gr.update(selected=view.tab), self._first_latent(view), view.q, view.kind

    def describe(self, current: tuple[str, str]) -> str:
        """What is open, in a line."""
        return describe_html(self.endpoints.describe(*current))

    def _first_latent(self, view: View) -> int:
        """The latent of the link, else the one with most energy."""
        current = view.sae, view.place
        if view.latent is not None or self.endpoints.describe(*current)["index_tokens"] is None:
            return view.latent or 0
        return self.endpoints.latents(*current, count=1)[0]["latent"]

    def open_source(self, source: str) -> tuple[Any, ...]:
        """Open a repository or folder."""
        return self._opened(View((source or "").strip()))

    def open_place(self, current: tuple[str, str], place: str) -> tuple[Any, ...]:
        """Open another SAE of the repository."""
        return self._opened(View(current[0], place))

    def _opened(self, view: View) -> tuple[Any, ...]:
        about = self.endpoints.describe(view.sae, view.place)
        latents, k = about["num_latents"], about["k"]
        if view.width > latents:
            warn(f"This SAE has {latents:,} latents, so the width {view.width:,} of the link is left out.")
        width = view.width if 1 <= view.width <= latents else latents
        most = min(latents, 4 * int(k or 1))
        if k is not None and view.k > most:
            warn(f"k goes up to {most} here, so the k of the link, {view.k:,}, is left out.")
        chosen = view.k if 1 <= view.k <= most else k
        return (
            about["sae"],
            gr.update(choices=about["places"], value=about["place"], interactive=len(about["places"]) > 1),
            describe_html(about),
            (about["sae"], about["place"]),
            gr.update(maximum=latents, value=width),
            gr.update(visible=False) if k is None else gr.update(maximum=most, value=chosen, visible=True),
            view.ranking,
            gr.update(maximum=latents, value=latents),
            *(about["sae"], about["place"]) * 2,
            max(1, latents // 4),
        )


def describe_html(about: dict[str, Any]) -> str:
    """What is open, in a line."""
    widths = about["prefix_widths"]
    prefixes = f", prefixes {', '.join(f'{width:,}' for width in widths)}" if len(widths) > 1 else ""
    model = f"<code>{escape(about['hookpoint'])}</code> of <code>{escape(str(about['base_model']))}</code>"
    known = "no feature index yet" if about["index_tokens"] is None else f"index of {about['index_tokens']:,} tokens"
    known = f"its feature index cannot be read: {escape(about['index_problem'])}" if about["index_problem"] else known
    return (
        f"<p><b>{escape(about['type'])}</b> ({escape(about['activation'])}), {about['num_latents']:,} "
        f"latents{prefixes}, on {model} (width {about['d_in']}); {known}.</p>"
    )


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
