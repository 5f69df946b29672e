"""The drawer at the right of the page: the latent that is open."""

from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..looks.feature_page import feature_page
from ..looks.messages import told, warn
from .inputs import LIGHT, Shown, area


class Drawer:
    """The drawer's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open; its `latent` opens the drawer.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints = endpoints
        with gr.Sidebar(position="right", open=False, width=480, elem_id="drawer") as self.sidebar:
            self.feature = area("feature")
        outputs = [self.sidebar, self.feature]
        shown.latent.input(told(self.show), [shown.current, shown.latent], outputs, **LIGHT)
        shown.opened.change(told(self.refresh), [shown.current, shown.opened], outputs, **LIGHT)

    def show(self, current: tuple[str, str], latent: float | None) -> tuple[Any, str]:
        """Open a latent."""
        if latent is None:
            raise ValueError("Say which latent: its number.")
        return gr.update(open=True), latent_html(self.endpoints, current, int(latent))

    def refresh(self, current: tuple[str, str], opened: dict[str, Any]) -> tuple[Any, str]:
        """Show the latent of a link; close the drawer where there is none."""
        latent, about = opened["latent"], self.endpoints.describe(*current)
        if latent is None or about["index_tokens"] is None:
            return gr.update(open=False), ""
        if latent >= about["num_latents"]:
            warn(f"This SAE has latents 0 to {about['num_latents'] - 1}, so there is no latent {latent}.")
            return gr.update(open=False), ""
        return self.show(current, latent)


def latent_html(endpoints: Endpoints, current: tuple[str, str], latent: int) -> str:
    """A latent's page; raises `ValueError` if there is none."""
    feature, family = endpoints.feature(latent, *current), endpoints.family(latent, *current)
    return feature_page(feature, family["below"], endpoints.describe(*current)["prefix_widths"], current)
