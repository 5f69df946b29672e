"""Compare: the open SAE, as Prune has it, beside another pruning of it or another SAE."""

import math
from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..looks import html
from ..looks.charts import Axis, Mark, line_chart
from ..looks.messages import shows_errors
from ..subject.opened import RANKINGS
from .inputs import BARS, BROWSER, HEAVY, LIGHT, Shown, area
from .prune import LARGEST, PARENT


_ROWS = (
    ("loss kept", "recaptured_zero", ".4f"),
    ("cross-entropy, nats per token", "ce", ".4f"),
    ("FVU: variance left unexplained", "fvu", ".4f"),
    ("L0: latents that fire per token", "l0", ".2f"),
    ("RSA: similarities kept", "rsa", ".4f"),
    ("size in MB", "size_mb", ".2f"),
)
Side = tuple[str, str, str, int]
"""An SAE, which of its SAEs, a ranking and a width."""


class CompareTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open: the one side.
        ranking (`gr.Radio`): Of Prune: the order of the one side.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown, ranking: gr.Radio) -> None:
        self.endpoints = endpoints
        gr.Markdown("**A** is the open SAE at the page's width, in the order that Prune has. **B** is:")
        with gr.Row():
            self.other = gr.Textbox(
                label="SAE B: repository or folder", placeholder="empty: the open one", scale=3, min_width=200
            )
            self.other_place = gr.Textbox(
                label="Which of its SAEs", placeholder="empty: the first", scale=2, min_width=140
            )
            self.other_ranking = gr.Radio(
                list(RANKINGS), value="trained", label="Order of B", elem_id="other-order", scale=4, min_width=280
            )
            self.other_width = gr.Number(0, precision=0, minimum=0, label="Width of B", scale=1, min_width=110)
        self.compare = gr.Button("Measure and compare", size="sm")
        self.outcome = area("comparison")
        right = [self.other, self.other_place, self.other_ranking, self.other_width]
        sides = [shown.current, ranking, shown.width, *right]
        measured = self.compare.click(shows_errors(self.measure), sides, self.outcome, **HEAVY)
        gr.on([self.other.submit, self.other_place.submit], shows_errors(self.measure), sides, self.outcome, **HEAVY)
        opened = shown.opened.change(shows_errors(self.refresh), [shown.current, shown.opened], right, **LIGHT)
        opened.success(shows_errors(self.show), sides, self.outcome, cancels=measured, **LIGHT)
        # A width is told last of all that it changes, perhaps after the button was pressed; an outcome knows its own.
        show = {"fn": shows_errors(self.show), "inputs": sides, "outputs": self.outcome, "trigger_mode": "always_last"}
        shown.width.release(**show, **LIGHT)
        orders = [ranking.input, self.other_ranking.input, self.other_width.input]
        gr.on(orders, **show, cancels=measured, **LIGHT)
        names = "other, other_place, other_ranking, other_width"
        for changed in (self.other, self.other_place, self.other_ranking, self.other_width):
            changed.input(None, right, None, js=f"({names}) => nested.show({{{names}}})", **BROWSER)
        for changed in (self.other, self.other_place):  # the outcome is of the one before
            changed.input(None, None, self.outcome, js="() => ''", **BROWSER)

    def refresh(self, current: tuple[str, str], opened: dict[str, Any]) -> tuple[Any, ...]:
        """The other side of a link; else the open SAE at a quarter, or whole where it is at a quarter itself."""
        latents = self.endpoints.num_latents(*current)
        quarter = max(1, latents // 4)
        stored = [row["width"] for row in self._rows((*current, "trained", 0))]
        near = min(stored or [quarter], key=lambda width: abs(math.log(width / quarter)))
        near = latents if near == opened["width"] else near
        width = opened["other_width"] or (0 if opened["other"] else near)
        return opened["other"], opened["other_place"], opened["other_ranking"], width

    def _sides(
        self,
        current: tuple[str, str],
        ranking: str,
        width: float,
        other: str,
        other_place: str,
        other_ranking: str,
        other_width: float | None,
    ) -> tuple[Side, Side]:
        other = (other or "").strip()
        sae, place = (other, other_place.strip()) if other else current
        latents = self.endpoints.num_latents(*current)
        left, right = min(int(width), latents), int(other_width or 0)
        if not other:
            right = right or latents
        return (*current, ranking, left), (sae, place, other_ranking, right)

    def show(self, *given: Any) -> str:
        """Both sides from what is stored, or was measured; another SAE, or another order, waits for the button."""
        left, right = self._sides(*given)
        if left[:2] != right[:2]:
            return '<p class="note">Press “Measure and compare”: nothing is stored of these two together.</p>'
        if all(self.endpoints.is_measured(*side) for side in (left, right)):
            return self.measure(*given)
        figures = [self._stored(side) for side in (left, right)]
        shown = self._outcome(left, right, figures)
        if None in figures:
            shown = '<p class="note">Not measured yet: press “Measure and compare” for the figures.</p>' + shown
        kept = None
        if left[2] == right[2] == "trained":
            kept = [set(range(left[3])), set(range(right[3]))]
        return _of(left[3], shown + (self._survivors(left, *kept) if kept else ""))

    def measure(self, *given: Any, progress: Any = BARS) -> str:  # noqa: ARG002 (gradio draws its bars there)
        """Both sides measured, drawn and matched."""
        left, right = self._sides(*given)
        comparison = self.endpoints.compare(*left, *right)
        shown = self._outcome(left, right, comparison["figures"])
        if comparison["same_sae"]:
            kept = [set(self.endpoints.kept(*side)) for side in (left, right)]
            return _of(left[3], shown + self._survivors(left, *kept))
        different = (
            '<p class="note">These read different places or models, so their hidden states are not the same and '
            "cosines of their latents mean little.</p>"
        )
        matched = _matches(comparison["matches"], left, right)
        return _of(left[3], shown + ("" if comparison["same_place"] else different) + matched)

    def _rows(self, side: Side) -> list[dict[str, Any]]:
        showcase = self.endpoints.showcase(*side[:2])
        return [] if showcase is None else showcase["curve"].get(side[2], [])

    def _stored(self, side: Side) -> dict[str, Any] | None:
        return next((row for row in self._rows(side) if row["width"] == side[3]), None)

    def _outcome(self, left: Side, right: Side, figures: list[dict[str, Any] | None]) -> str:
        """The curves of both with a mark at each, and their figures; nothing where none are known."""
        key, label = "recaptured_zero", "loss kept (1: as the model alone)"
        if any(row.get(key) is None for side in (left, right) for row in self._rows(side)):
            key, label = "fvu", "FVU: variance left unexplained"
        curves, marks = {}, []
        for letter, side, row in zip("AB", (left, right), figures, strict=True):
            points = [(one["width"], one[key]) for one in self._rows(side)]
            name = f"{letter}: {_name(side[0])}, {side[2]} order"
            if letter == "B" and side[:3] == left[:3]:
                name = next(iter(curves))
            curves[name] = sorted({*points, *curves.get(name, [])})
            if row is not None and row.get(key) is not None:
                width = row["width"]
                curves[name] = sorted({*curves[name], (width, row[key])})
                marks.append(Mark(name, width, row[key], f"{letter}: {width:,}"))
        if not any(curves.values()):
            return ""
        chart = line_chart(curves, Axis("width (latents)", log=True), Axis(label), marks)
        table = [
            [title, *(html.number((row or {}).get(key), form) for row in figures)]
            for title, key, form in _ROWS
            if any((row or {}).get(key) is not None for row in figures)
        ]
        names = [f"A: {left[3]:,}, {left[2]}", f"B: {figures[1]['width'] if figures[1] else right[3]:,}, {right[2]}"]
        columns = html.table(["measured", *names], table, numbers=(1, 2)) if table else ""
        return f'<div class="wide">{chart}<section>{columns}</section></div>'

    def _survivors(self, side: Side, left: set[int], right: set[int]) -> str:
        """Latents of one SAE that both sides keep, on the picture."""
        both, only_left, only_right = left & right, sorted(left - right), sorted(right - left)
        counted = (
            f"<h2>Which latents survive</h2><p><b>{len(both):,}</b> are in both; A alone keeps {len(only_left):,}, "
            f"B alone {len(only_right):,}.</p>"
        )
        names = "".join(
            f"<p>{letter} alone: {_names(latents, side)}</p>"
            for letter, latents in (("A", only_left), ("B", only_right))
            if latents
        )
        about = self.endpoints.describe(*side[:2])
        indexed = about["index_tokens"] is not None and len(about["prefix_widths"]) > 1
        picture = html.picture(self.endpoints.picture(*side[:2], PARENT, LARGEST), both) if indexed else ""
        return f"{counted}{picture}<details><summary>Their numbers</summary>{names}</details>"


def _of(width: int, shown: str) -> str:
    return f'<nested-of data-given="{width}">{shown}</nested-of>'


def _name(sae: str) -> str:
    return sae.rstrip("/").rpartition("/")[2]


def _names(latents: list[int], side: Side, most: int = 20) -> str:
    names = ", ".join(html.latent_name(side[0], side[1], latent) for latent in latents[:most])
    return (names or "none") + (f" and {len(latents) - most:,} more" if len(latents) > most else "")


def _matches(matches: dict[str, Any], left: Side, right: Side) -> str:
    def other(latent: int) -> str:  # of an SAE that is not the open one: a link, which opens it
        return html.latent_name(*right[:2], latent).replace(" data-latent", " data-other")

    rows = [[html.latent_name(*left[:2], one), other(two), f"{cosine:.3f}"] for one, two, cosine in matches["pairs"]]
    alone = _names(matches["alone"], left)
    rest = matches["count_alone"] - len(matches["alone"])
    return (
        "<h2>Which latents survive</h2>"
        f"<p><b>{matches['share_left']:.1%}</b> of A's latents are in B and <b>{matches['share_right']:.1%}</b> of "
        "B's in A, with a decoder cosine of at least 0.7 (mean of A's best cosines: "
        f"{matches['mean_cosine']:.3f}).</p>"
        f"<p>A's latents with none like them in B, {matches['count_alone']:,}: {alone}"
        f"{f' and {rest:,} more' if rest > 0 else ''}</p>"
        f"<h3>Matched latents</h3><p>{matches['mutual']:,} pairs are each other's nearest; the most similar:</p>"
        + html.table(["A", "B", "cosine"], rows, numbers=(2,))
    )
