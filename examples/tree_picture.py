# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_matryoshka_sae[space]", "playwright"]
#
# [tool.uv.sources]
# hf_matryoshka_sae = {path = "..", editable = true}
# ///
"""Draw the family of a latent, with where each member fires most: `docs/tree.png` was made so.

    python examples/tree_picture.py runs/sae 71 --output docs/tree.png [--dataset text.parquet]

The SAE needs a feature index (`matryoshka-sae index`). The picture is a page, photographed by Chromium.
"""

import argparse
import shutil
from importlib.resources import files
from pathlib import Path

from playwright.sync_api import sync_playwright

from hf_matryoshka_sae.space import Library
from hf_matryoshka_sae.space.endpoints import Endpoints
from hf_matryoshka_sae.space.looks.html import escape, tokens


STYLE = """
body { --body-text-color: #1f2937; --border-color-primary: #d1d5db; --font-mono: monospace; --text-md: 15px;
  font: 15px/1.45 system-ui, sans-serif; width: 860px; margin: 0; padding: 16px 20px; background: #fff; }
section { border-left: 3px solid #d1d5db; padding: 2px 0 2px 12px; margin: 8px 0; }
.context { display: block; max-height: 1.7em; overflow: hidden; white-space: nowrap; }
.context .tokens { white-space: pre !important; }
"""


def member(endpoints: Endpoints, sae: str, latent: int, widths: list[int], shown: int) -> str:
    """A latent with its strongest contexts, and below it its children."""
    found = endpoints.feature(latent, sae)
    score = "" if found["parent"] is None else f", score {found['parent'][1]:.2f}"
    lines = []
    for context in found["contexts"][:shown]:
        peak = context["peak"]
        cut = slice(max(0, peak - 9), peak + 6)
        texts = [text.replace("\n", "↵") for text in context["tokens"][cut]]
        shaded = tokens(texts, context["activations"][cut], found["max"], peak - cut.start)
        lines.append(f'<span class="context">{shaded}</span>')
    children = "".join(member(endpoints, sae, child, widths, shown) for child, _, _ in found["children"])
    return (
        f"<section><b>Latent {latent}</b> in width {found['widths'][0]:,}: {escape(found['label'])} "
        f'<span class="quiet">{found["frequency"]:.2%} of tokens{score}</span>{"".join(lines)}{children}</section>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sae", help="folder or Hub id")
    parser.add_argument("latent", type=int)
    parser.add_argument("--dataset", help="any text of the language model, to open the SAE with")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("tree.png"))
    parsed = parser.parse_args()
    endpoints = Endpoints(Library(parsed.dataset, tokens=1_000))
    widths = endpoints.describe(parsed.sae)["prefix_widths"]
    style = (files("hf_matryoshka_sae.space") / "page.css").read_text() + STYLE
    family = member(endpoints, parsed.sae, parsed.latent, widths, parsed.contexts)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 200}, device_scale_factor=1.5)
        page.set_content(f'<style>{style}</style><body class="space-html">{family}</body>')
        page.screenshot(path=parsed.output, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
