"""The drawer: a latent's page beside whatever is shown; on a phone, a sheet over it."""

from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..limits import UNREACHABLE
from ..looks.chips import problem
from ..looks.feature_page import feature_head, feature_page
from .inputs import BROWSER, LIGHT, Shown, area


_OPENING = "(current, latent) => { latentDrawer.opening(latent); return [current, latent]; }"


class Drawer:
    """Shows the latent that `shown.latent` names, and is closed while that is empty.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.

    Attributes:
        steer (`gr.Button`), like (`gr.Button`): Pressed to steer the latent, and to look for others like it.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints = endpoints
        with gr.Column(elem_id="drawer"):
            self.close = gr.Button("Close", size="sm", elem_id="drawer-close")
            self.head = area("latent-head")
            with gr.Row(elem_id="latent-tools"):
                self.steer = gr.Button("Steer this", size="sm", min_width=80)
                self.like = gr.Button("Find its like", size="sm", min_width=80)
                self.link = gr.Button("Copy link", size="sm", min_width=80, elem_id="latent-link")
                self.picture = gr.Button("Picture", size="sm", min_width=80)
            self.threshold = gr.Number(0.6, visible="hidden", elem_id="card-threshold")
            self.address = gr.Textbox("", visible="hidden", elem_id="card-address")
            self.card = area("family-card")
            self.page = area("latent-page")
        parts, shows = [self.head, self.page, self.card, self.steer, self.picture], [shown.current, shown.latent]
        showing: dict[str, Any] = {"trigger_mode": "always_last", **LIGHT}
        for event in (
            shown.latent.input(self.show, shows, parts, js=_OPENING, **showing),
            shown.opened.change(self.refresh, [shown.current, shown.opened], [shown.latent, *parts], **showing),
        ):
            event.then(None, shown.latent, None, js="latent => latentDrawer.opened(latent)", **BROWSER)
        self.close.click(None, None, None, js="() => latentDrawer.close()", **BROWSER)
        self.link.click(None, None, None, js="() => latentDrawer.copyLink()", **BROWSER)
        self.picture.click(
            self.draw,
            [shown.current, shown.latent, self.threshold, self.address],
            self.card,
            js="(current, latent) => [current, latent, ...latentDrawer.card()]",
            **LIGHT,
        )

    def refresh(self, current: tuple[str, str], view: dict[str, Any]) -> tuple[Any, ...]:
        """The latent of a link, of an SAE that was just opened."""
        latent = view["latent"]
        return latent, *self.show(current, latent)

    def show(self, current: tuple[str, str], latent: float | None) -> tuple[Any, ...]:
        """A latent's page, or what is wrong with its number."""
        if latent is None:
            return "", "", "", gr.update(), gr.update()
        try:
            feature = self.endpoints.feature(int(latent), *current)
            about = self.endpoints.describe(*current)
        except (ValueError, *UNREACHABLE) as error:
            return (
                f'<h2 tabindex="-1">Latent {int(latent)}</h2>',
                problem(error),
                "",
                gr.update(visible=False),
                gr.update(visible=False),
            )
        return (
            feature_head(feature, current),
            feature_page(feature, about["prefix_widths"], current),
            "",
            gr.update(visible=about["generates"]),
            gr.update(visible=len(about["prefix_widths"]) > 1),
        )

    def draw(self, current: tuple[str, str], latent: float | None, threshold: float, address: str) -> str:
        """The latent's family as a picture to send on."""
        try:
            card = self.endpoints.family_card(int(latent or 0), *current, threshold, address)
        except (ValueError, *UNREACHABLE) as error:
            return problem(error)
        buttons = "".join(
            f'<button type="button" class="small" data-save="{kind}">Save as {kind.upper()}</button> '
            for kind in ("png", "svg")
        )
        return f'<div class="scroll" tabindex="0">{card}</div><p>{buttons}</p>'
