"""Prune: how many latents keep how much, what that is worth, and taking the pruned SAE along. The first screen."""

import re
import tempfile
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.messages import shows_errors, warn
from ..subject.opened import RANKINGS
from ..subject.prunings import SELECTION
from .inputs import BARS, BROWSER, HEAVY, LIGHT, Shown, area, on_a_space


SAMPLE = "The module defines a function that returns the number of items in the list."
_STEPS = 12
"""So many widths of a curve measured from the page, evenly spaced in their logarithm, besides the prefixes."""

PARENT = 0.6
"""Score from which a latent is drawn below another in the picture: the masked cosine that a parent must have."""

LARGEST = 260
"""Latents that the picture shows here, of the largest families; Explore shows more."""


class Asked(NamedTuple):
    """What figures are of, but for the width.

    Args:
        current (`tuple[str, str]`): Source and place of the SAE.
        opened (`dict`): What was opened, and when.
        ranking (`str`), k (`int`): Of the pruning.
    """

    current: tuple[str, str]
    opened: dict[str, Any]
    ranking: str
    k: int


class PruneTab:
    """The tab's components and what they do.

    The browser holds what is measured, by width, and draws sentence, curve and figures of the page's width from it: so
    they always belong to what the controls say.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints, self.shown = endpoints, shown
        self.scratch = tempfile.TemporaryDirectory(prefix="hf_matryoshka_sae-")
        self.rows, self.todo = gr.State(None), gr.State(None)
        self.curve = area("curve")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                gr.HTML(
                    "<nested-answer></nested-answer>", elem_id="answer", elem_classes="space-html", js_on_load=None
                )
                with gr.Row():
                    self.whole_curve = gr.Button("Measure the curve", size="sm", visible=False, min_width=120)
                    self.stop = gr.Button("Stop", size="sm", visible=False, min_width=80)
            with gr.Column(scale=2, min_width=300):
                self.sample = area("sample")
        self.picture = area("picture")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.figures = area("figures", "<nested-figures></nested-figures>")
            with gr.Column(scale=2, min_width=300):
                self.measure = gr.Button("Measure this width", size="sm", elem_id="measure")
                self.download = gr.Button("Download these latents", variant="primary", elem_id="download")
                self.file = gr.DownloadButton("The pruned SAE", visible="hidden", elem_id="zip")
                with gr.Accordion("Order and number of latents", open=False):
                    self.ranking = gr.Radio(
                        list(RANKINGS),
                        value="trained",
                        label="Ranking: which latents come first",
                        info="A Matryoshka SAE is sorted within its prefixes.",
                    )
                    self.k = gr.Slider(
                        1, 64, 16, step=1, label="k: latents per token", visible=False, elem_id="k", buttons=[]
                    )
                with gr.Accordion("Push it to the Hub", open=False):
                    self._pushing()
        with gr.Accordion("A text of yours at this width", open=False):
            self.text = gr.Textbox(SAMPLE, label="Text", lines=2, max_lines=8)
            self.read = gr.Button("Reconstruct and continue", size="sm")
            self.reconstructed = area("reconstructed")
        self._wire()

    def _pushing(self) -> None:
        self.repo = gr.Textbox(label="Your repository", placeholder="your-name/pruned-sae")
        if on_a_space():
            gr.LoginButton()
            self.token = gr.State("")
        else:
            self.token = gr.Textbox(
                label="Token with write access",
                info="Empty: the one this machine is logged in with.",
                type="password",
            )
        self.private = gr.Checkbox(True, label="private")
        self.push = gr.Button("Push")
        self.pushed = gr.Markdown()

    def _wire(self) -> None:
        shown = self.shown
        pruning = [shown.current, self.ranking, shown.width, self.k]
        asked = [shown.current, shown.opened, self.ranking, self.k, self.rows]
        known = [self.rows, self.curve]
        progress = {"show_progress": "minimal", "show_progress_on": self.figures}
        step = self.todo.change(
            shows_errors(self.measure_next), [*asked, self.todo], [*known, self.todo, self.stop], **HEAVY | progress
        )
        measured = [
            event(
                shows_errors(self.measure_width),
                [*asked, shown.width],
                known,
                trigger_mode="always_last",
                **HEAVY | progress,
            )
            for event in (shown.width.release, self.measure.click)
        ]
        start = [*known, self.todo, self.whole_curve, self.stop]
        shown.opened.change(
            shows_errors(self.refresh),
            [shown.current, shown.opened, self.todo],
            [self.ranking, self.k, *start, self.sample, self.picture],
            cancels=[step, *measured],
            **LIGHT,
        )
        for event in (self.ranking.input, self.k.release):
            event(shows_errors(self.start_over), [*asked[:-1], self.todo], start, cancels=[step, *measured], **LIGHT)
        self.whole_curve.click(shows_errors(self.plan), asked, [self.todo, self.whole_curve, self.stop], **LIGHT)
        self.stop.click(self.halt, self.todo, [self.stop, self.whole_curve], cancels=step, **LIGHT)
        self.ranking.input(None, self.ranking, None, js="ranking => nested.show({ranking})", **BROWSER)
        self.k.input(None, self.k, None, js="k => nested.show({k})", **BROWSER)
        # What a text became, and where it was pushed, are of the pruning that was: gone with the next.
        for event in (shown.width.change, self.ranking.input, self.k.input, shown.opened.change):
            event(lambda: ("", ""), None, [self.reconstructed, self.pushed], js="() => ['', '']", **BROWSER)
        gr.on(
            [self.read.click, self.text.submit],
            shows_errors(self.reconstruct),
            [*pruning, self.text],
            self.reconstructed,
            **HEAVY,
        )
        self.download.click(shows_errors(self.make_download), pruning, self.file, **HEAVY).success(
            None, None, None, js="() => setTimeout(() => nested.download('zip'), 100)", **BROWSER
        )
        pushing = self.push_logged_in if on_a_space() else self.push_with_token
        self.push.click(shows_errors(pushing), [*pruning, self.repo, self.token, self.private], self.pushed, **HEAVY)

    # What is known

    def refresh(
        self, current: tuple[str, str], opened: dict[str, Any], todo: dict[str, Any] | None
    ) -> tuple[Any, ...]:
        """What the tab shows of an SAE that was just opened: what is stored with its index."""
        about, showcase = self.endpoints.describe(*current), self.endpoints.showcase(*current)
        k, control = about["k"], gr.update(visible=False)
        if k is not None:
            most = min(about["num_latents"], 4 * int(k))
            if opened["k"] > most:
                warn(f"k goes up to {most} here, so the k of the link, {opened['k']:,}, is left out.")
            chosen = opened["k"] if 1 <= opened["k"] <= most else k
            control = gr.update(maximum=most, value=chosen, visible=True)
            k = chosen
        start = self.start_over(current, opened, opened["ranking"], k or 0, todo)
        sample = "" if showcase is None else sample_html(showcase)
        indexed = about["index_tokens"] is not None and len(about["prefix_widths"]) > 1
        picture = self.endpoints.picture(*current, PARENT, LARGEST) if indexed else ""
        return opened["ranking"], control, *start, sample, html.picture(picture)

    def start_over(
        self, current: tuple[str, str], opened: dict[str, Any], ranking: str, k: int, todo: dict[str, Any] | None
    ) -> tuple[Any, ...]:
        """What is stored of a ranking, where another one was."""
        self.halt(todo)
        asked = Asked(current, opened, ranking, k)
        rows = self._stored(asked)
        state = {"key": self._key(asked), "rows": rows}
        enough = gr.update(visible=len(rows) < 2)
        return state, self._curve(asked, rows, first=True), None, enough, gr.update(visible=False)

    def _stored(self, asked: Asked) -> list[dict[str, Any]]:
        showcase = self.endpoints.showcase(*asked.current)
        stored = showcase is not None and self._trained_k(asked)
        return showcase["curve"].get(asked.ranking, []) if stored else []

    def _key(self, asked: Asked) -> str:
        """A name for what figures are of; where k cannot be chosen its slider says nothing."""
        trained = self.endpoints.describe(*asked.current)["k"]
        return f"{asked.opened['time']} {asked.ranking} {0 if trained is None else int(asked.k) or trained}"

    def _trained_k(self, asked: Asked) -> bool:
        trained = self.endpoints.describe(*asked.current)["k"]
        return trained is None or int(asked.k) in (0, trained)

    def _curve(self, asked: Asked, rows: list[dict[str, Any]], first: bool = False) -> str:
        """What is measured, for the browser, which leaves it out if it has gone on to another ranking or SAE."""
        about, showcase = self.endpoints.describe(*asked.current), self.endpoints.showcase(*asked.current)
        trained_k = self._trained_k(asked)
        return html.data(
            "nested-curve",
            {
                "key": self._key(asked),
                "first": first,
                "latents": about["num_latents"],
                "prefixes": about["prefix_widths"],
                "rows": rows,
                "tokens": about["tokens"] if showcase is None else showcase["tokens"],
                "selection": SELECTION if showcase is None else showcase["selection"],
                "hookpoint": about["hookpoint"],
                "about": f"{asked.ranking} ranking" + ("" if trained_k else f", k = {int(asked.k)}"),
                "command": self._command(about) if asked.ranking == "trained" and trained_k else "",
            },
        )

    def _command(self, about: dict[str, Any]) -> str:
        """What measures the same in a shell; nothing for a folder of the machine that serves strangers."""
        if self.endpoints.library.dataset is not None or self.endpoints.library.public:
            return ""
        return f"matryoshka-sae evaluate {about['sae']}"

    # What is measured

    def measure_width(
        self,
        current: tuple[str, str],
        opened: dict[str, Any],
        ranking: str,
        k: int,
        known: dict[str, Any],
        width: int,
        progress: Any = BARS,  # noqa: ARG002 (gradio draws its bars there)
    ) -> tuple[Any, ...]:
        """The figures at a width, added to those that are known."""
        asked = Asked(current, opened, ranking, k)
        rows = self._known(asked, known)
        if any(row["width"] == int(width) for row in rows):
            return gr.skip(), gr.skip()
        return self._measured(asked, rows, int(width))

    def _known(self, asked: Asked, known: dict[str, Any] | None) -> list[dict[str, Any]]:
        # What was measured last may be of the ranking before, if it came late.
        ours = known is not None and known["key"] == self._key(asked)
        return known["rows"] if ours else self._stored(asked)

    def _measured(self, asked: Asked, rows: list[dict[str, Any]], width: int) -> tuple[dict[str, Any], str]:
        if self._trained_k(asked):
            row = self.endpoints.curve_point(*asked.current, asked.ranking, width)
        else:
            row = self.endpoints.measure(*self._chosen(asked.current, asked.ranking, width, asked.k))
        rows = with_row(self._beside_measured(asked, rows), row | {"selection": SELECTION})
        return {"key": self._key(asked), "rows": rows}, self._curve(asked, rows)

    def _beside_measured(self, asked: Asked, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that are of the text, tokens and selection of what is measured here: one curve has one measure."""
        showcase = self.endpoints.showcase(*asked.current)
        if showcase is None or showcase["comparable"]:
            return rows
        return [row for row in rows if "selection" in row]  # those that were measured here

    def plan(
        self, current: tuple[str, str], opened: dict[str, Any], ranking: str, k: int, known: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The widths to measure, each a job of its own, so that others' questions come in between."""
        asked, about = Asked(current, opened, ranking, k), self.endpoints.describe(*current)
        done = [row["width"] for row in self._beside_measured(asked, self._known(asked, known))]
        widths = [width for width in curve_widths(about["num_latents"], about["prefix_widths"]) if width not in done]
        plan = {"key": self._key(asked), "widths": widths, "stopped": False}
        return plan, gr.update(visible=False), gr.update(visible=True)

    def measure_next(
        self,
        current: tuple[str, str],
        opened: dict[str, Any],
        ranking: str,
        k: int,
        known: dict[str, Any],
        plan: dict[str, Any] | None,
    ) -> tuple[Any, ...]:
        """Measure the next width of a curve; what is left starts the next."""
        asked = Asked(current, opened, ranking, k)
        if plan is None or plan["stopped"] or plan["key"] != self._key(asked) or not plan["widths"]:
            return gr.skip(), gr.skip(), gr.skip(), gr.update(visible=False)
        width, *widths = plan["widths"]
        known, curve = self._measured(asked, self._known(asked, known), width)
        if plan["stopped"]:  # meanwhile
            return known, curve, gr.skip(), gr.update(visible=False)
        return known, curve, plan | {"widths": widths}, gr.update(visible=bool(widths))

    @staticmethod
    def halt(plan: dict[str, Any] | None) -> tuple[Any, Any]:
        """Measure no further width of a curve."""
        if plan is not None:
            plan["stopped"] = True  # in place: a width that is being measured sees it, too
        return gr.update(visible=False), gr.update(visible=True)

    def _chosen(self, current: tuple[str, str], ranking: str, width: int, k: int) -> tuple[str, str, str, int, int]:
        # A slider may still have the width of the SAE that was open before.
        return *current, ranking, min(int(width), self.endpoints.num_latents(*current)), int(k)

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


def with_row(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows by width, with another that replaces one of its width."""
    return sorted([*(one for one in rows if one["width"] != row["width"]), row], key=lambda one: one["width"])


def curve_widths(latents: int, prefixes: Sequence[int]) -> list[int]:
    """Return the widths of a curve: the whole first, every prefix, and others evenly spaced in their logarithm."""
    smallest = max(1, latents // 64)
    spaced = [round(smallest * (latents / smallest) ** (step / (_STEPS - 1))) for step in range(_STEPS)]
    return sorted({*spaced, *prefixes, latents}, reverse=True)


def sample_html(showcase: dict[str, Any]) -> str:
    """Return the stored sentence, to be coloured by latent at each of its widths."""
    sample = showcase.get("sample")
    if not sample:
        return ""
    # A beginning-of-text token is not text.
    start = int(bool(re.fullmatch(r"<\S+>|\[\S+\]", sample["tokens"][0])))
    given = {
        **sample,
        "tokens": [html.visible(token) for token in sample["tokens"][start:]],
        "firings": [tokens[start:] for tokens in sample["firings"]],
        "largest": showcase["largest"],
        "labels": showcase.get("labels", {}),
    }
    return html.data("nested-sample", given)


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
        f"{facts}{cut}{html.table(['which', 'continuation'], rows)}"
    )
