"""What all pages of this package look like: colours, styles, scripts, and the card that a link to them shows."""

from importlib.resources import files
from typing import Any

import gradio as gr


TITLE = "Matryoshka SAEs: dictionaries nested in each other"
_CARD = {
    "og:type": "website",
    "og:title": TITLE,
    "og:description": "How many latents of a sparse autoencoder are enough, what each fires on, which refines which.",
    "twitter:card": "summary",
}


def looks() -> dict[str, Any]:
    """Return the arguments of `gr.Blocks.launch` that dress a page."""
    started = "".join(f"({script})();\n" for script in _all_of("js"))
    card = "".join(f'<meta property="{name}" content="{content}">' for name, content in _CARD.items())
    return {"css": "\n".join(_all_of("css")), "js": f"() => {{ {started} }}", "head": card, "theme": theme()}


def theme() -> gr.themes.Base:
    """Return the colours of the pages: text has a contrast of at least 4.5 to 1, light and dark."""
    return gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate").set(
        color_accent="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        slider_color="*primary_500",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def _all_of(kind: str) -> list[str]:
    """Read the package's scripts or styles; `page` comes first, as the others build on it."""
    found = sorted(
        files(__package__.rpartition(".")[0]).iterdir(), key=lambda file: (file.name[:5] != "page.", file.name)
    )
    return [file.read_text(encoding="utf-8") for file in found if file.name.endswith(f".{kind}")]
