"""The first screen in a real browser: from a target to a width and back, its figures, and the pruned SAE."""

import json
import math
import re
import zipfile

import pytest
import torch
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.studies.command import main as evaluate

from ..conftest import SERVER
from .conftest import TOKENS, choose_tab, figures, rest, set_width


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stored() -> list[dict]:
    """The curve that ships with the embedded SAE."""
    showcase = json.loads((embedded_sae_path() / "features" / "showcase.json").read_text())
    return showcase["curve"]["trained"]


def width_for(rows: list[dict], target: float) -> int:
    """The smallest width that keeps so much of the loss, on straight lines over log width."""
    for low, high in zip([None, *rows], rows, strict=False):
        if high["recaptured_zero"] >= target:
            if low is None:
                return high["width"]
            part = (target - low["recaptured_zero"]) / (high["recaptured_zero"] - low["recaptured_zero"])
            between = math.log(low["width"]) + part * math.log(high["width"] / low["width"])
            return math.ceil(math.exp(between) - 1e-9)
    raise AssertionError("not reached")


def test_the_first_screen_asks_nothing(open_page, stored):
    page = open_page()
    wanted = f"{width_for(stored, 0.95)} of 2,048 latents keep 95% of the loss"
    page.locator("#answer .answer", has_text=wanted).wait_for()
    assert page.locator("#answer nested-chart .series circle").count() == len(stored)
    assert page.locator("#answer nested-chart .prefix").count() == 5
    assert page.locator("#sample button.token").count() > 5
    assert page.locator("#picture a.block").count() > 100
    assert figures(page)["size in MB"] == "2.13"
    assert page.url.endswith("/") and page.locator(".toast-body").count() == 0


def test_the_smallest_width_for_a_target_is_measured_and_downloaded(desktop, stored, tmp_path):
    page = desktop
    choose_tab(page, "Prune")
    width = width_for(stored, 0.95)
    page.locator("#answer input[type=range]").fill("95")
    page.locator("#figures th", has_text=f"first {width}").wait_for()
    shown = figures(page)
    arguments = ["--widths", str(width), "--tokens", str(TOKENS), "--selection", "restrict", "--no_baselines"]
    assert evaluate(["embedded", *arguments, "--output_dir", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    (row,) = result["saes"]["embedded"]
    assert shown["FVU: variance left unexplained"] == f"{row['fvu']:.4f}"
    assert shown["loss kept: 1 is the model alone, 0 is zeros in this place"] == f"{row['recaptured_zero']:.4f}"
    assert shown["cross-entropy, nats per token"] == f"{row['ce']:.4f}"
    assert shown["L0: latents that fire per token"] == f"{row['l0']:.2f}"
    assert shown["RSA: similarities kept (Spearman)"] == f"{row['rsa']['spearman']:.4f}"
    # The curve is of other tokens than these figures, so its own sentence goes on interpolating.
    assert page.locator("#answer .here").inner_text().startswith(f"The first {width} keep about 95.0%")
    assert f"width={width}" in page.url
    rest(page)
    with page.expect_download() as started:
        page.get_by_role("button", name="Download these latents").click()
    started.value.save_as(tmp_path / "pruned.zip")
    with zipfile.ZipFile(tmp_path / "pruned.zip") as file:
        file.extractall(tmp_path)
    pruned = AutoModel.from_pretrained(tmp_path / f"embedded-trained-{width}")
    assert pruned.config.num_latents == width and pruned.prefix_widths == [64, width]
    whole = AutoModel.from_pretrained(embedded_sae_path())
    assert torch.equal(pruned.W_dec, whole.W_dec[:width])


@pytest.mark.release
def test_what_is_shown_is_of_the_width_that_is_chosen(desktop):
    page = desktop
    set_width(page, 300)
    set_width(page, 301)
    page.locator("#figures th", has_text="first 301").wait_for()
    rest(page)
    assert page.locator("#figures th", has_text="first 301").count() == 1
    assert page.locator("#answer nested-chart .mark text").text_content().startswith("301: ")
    assert page.locator("#picture a.block:not(.dim)").count() > 50
    dimmed = page.locator("#picture a.block").evaluate_all(
        "blocks => blocks.every(block => block.classList.contains('dim') == block.dataset.latent >= 301)"
    )
    assert dimmed
    before = page.locator("#sample dd").last.inner_text()
    set_width(page, 2)  # not measured yet: no figures of another width stand there meanwhile
    assert page.locator("#figures th", has_text="first 301").count() == 0
    assert page.locator("#sample dd").last.inner_text() != before
    assert "with 32 latents" in page.locator("#sample dl").inner_text()


@pytest.mark.release
def test_a_click_in_the_curve_is_a_width(desktop):
    page = desktop
    choose_tab(page, "Prune")
    x = page.locator("#answer nested-chart .prefix").nth(2).get_attribute("x1")
    page.locator("#answer nested-chart svg").click(position={"x": float(x) + 3, "y": 100})
    page.locator("#figures th", has_text="first 448").wait_for()
    page.locator("#answer nested-chart svg").hover(position={"x": float(x) + 3, "y": 100})
    assert "448: " in page.locator("#answer nested-chart .hover text").text_content()


@pytest.mark.release
def test_another_order_is_shown_and_downloaded(desktop, tmp_path):
    page = desktop
    set_width(page, 192)
    page.get_by_text("Order and number of latents").click()
    page.get_by_role("radio", name="energy").first.click()
    page.locator("#figures p", has_text="energy ranking").first.wait_for()
    assert "ranking=energy" in page.url
    rest(page)
    with page.expect_download() as started:
        page.get_by_role("button", name="Download these latents").click()
    assert started.value.suggested_filename == "embedded-energy-192.zip"
    page.get_by_role("radio", name="frequency").first.click()  # nothing is stored of it
    page.locator("#answer .answer", has_text="Nobody has measured it").wait_for()
    page.get_by_role("button", name="Measure the curve").click()
    page.locator("#answer nested-chart .series circle").nth(1).wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    rest(page)
    measured = page.locator("#answer nested-chart .series circle").count()
    assert 2 <= measured < 12
    page.get_by_role("radio", name="trained").first.click()
    page.locator("#answer .answer", has_text="keep 95").wait_for()


@pytest.mark.release
def test_a_text_is_reconstructed_and_its_markup_stays_text(desktop):
    page = desktop
    set_width(page, 448)
    page.get_by_text("A text of yours at this width").click()
    page.get_by_label("Text", exact=True).fill("<i>slanted</i> &amp; <script>alert(2)</script>")
    page.get_by_role("button", name="Reconstruct and continue").click()
    page.locator("#reconstructed td", has_text="with 448 latents").wait_for()
    assert page.locator("#reconstructed .token").count() > 3
    assert page.locator("#reconstructed i, #reconstructed script").count() == 0
    assert "&amp;" in page.locator("#reconstructed p").first.inner_text()
    set_width(page, 64)
    page.wait_for_function("!document.querySelector('#reconstructed').innerText.trim()")


@pytest.mark.release
def test_a_pruned_sae_is_pushed_opened_and_shows_what_is_known(open_page):
    SERVER.reset()
    page = open_page("?width=64")
    rest(page)
    page.get_by_text("Push it to the Hub").click()
    page.get_by_label("Your repository").fill("somebody/pruned")
    page.get_by_label(re.compile("Token with write access")).fill("hf_loopback")
    page.get_by_role("button", name="Push", exact=True).click()
    page.get_by_text("Pushed:").wait_for()
    page.get_by_role("button", name="Open another").click()
    page.get_by_label("SAE: a repository on the Hub").fill("somebody/pruned")
    page.get_by_label("SAE: a repository on the Hub").press("Enter")
    page.locator("#about", has_text=re.compile("64 latents.*no feature index")).wait_for()
    page.locator("#answer .answer", has_text="How many of 64 latents keep 95%").wait_for()
    assert not page.locator("#picture svg").count() and not page.locator("#sample button").count()
    assert page.url.endswith("?sae=somebody%2Fpruned")
