"""The page in a real browser: each tab does what it is for, by mouse and by keyboard, on a desktop and on a phone."""

import json
import re
import zipfile
from urllib.parse import urlencode

import pytest
import torch
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path, load_embedded_lm
from hf_matryoshka_sae.features import build_index
from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig, TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.studies.command import main as evaluate

from ..conftest import SERVER
from .conftest import TOKENS, choose_tab, rest


pytestmark = pytest.mark.slow

WIDTH = 448
MARKUP = '<form action="https://evil.example/"><input><button>Log in</button></form><img src="https://evil.example/p">'


def figures(page) -> dict[str, str]:
    """The table on the Prune tab: what is in its first column, by title."""
    rows = page.locator("#figures tbody tr").all()
    return {row.locator("td").nth(0).inner_text(): row.locator("td").nth(1).inner_text() for row in rows}


def set_width(page) -> None:
    choose_tab(page, "Prune")
    page.get_by_label("number input for Width: latents that are kept").fill(str(WIDTH))


def open_source(page, source: str) -> None:
    rest(page)
    page.get_by_label("SAE: a repository on the Hub").fill(source)
    page.get_by_role("button", name="Open", exact=True).first.click()


def test_pruning_shows_what_evaluate_measures(desktop, tmp_path):
    page = desktop
    set_width(page)
    page.get_by_role("button", name="Measure this width").click()
    page.locator("#figures th", has_text=f"{WIDTH} latents, trained").wait_for()
    shown = figures(page)
    arguments = ["--widths", str(WIDTH), "--tokens", str(TOKENS), "--selection", "restrict", "--no_baselines"]
    assert evaluate(["embedded", *arguments, "--output_dir", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    (row,) = result["saes"]["embedded"]
    assert shown["FVU: fraction of variance unexplained"] == f"{row['fvu']:.4f}"
    assert shown["recaptured loss (zero ablation)"] == f"{row['recaptured_zero']:.4f}"
    assert shown["cross-entropy, nats per token"] == f"{row['ce']:.4f}"
    assert shown["L0: latents that fire per token"] == f"{row['l0']:.2f}"
    assert shown["RSA (Spearman)"] == f"{row['rsa']['spearman']:.4f}"
    assert float(shown["size in MB"]) == pytest.approx(WIDTH / 2048 * 2.13, rel=0.02)
    assert page.locator("#chart .mark text").first.inner_html() == f"{WIDTH}: {row['fvu']:.4f}"
    assert f"width={WIDTH}" in page.url


def test_the_slider_moves_the_marker_by_keyboard(desktop):
    page = desktop
    set_width(page)
    page.locator("#chart .mark").first.wait_for()
    before = page.locator("#chart .mark circle").first.get_attribute("cx")
    slider = page.get_by_role("slider", name=re.compile("Width: latents that are kept"))
    slider.focus()
    for _ in range(5):
        page.keyboard.press("PageDown")
    moved = "before => Number(document.querySelector('#chart .mark circle').getAttribute('cx')) < before"
    page.wait_for_function(moved, arg=float(before))
    page.locator("#chart .mark text", has_text="about").wait_for()


def test_a_text_is_reconstructed_and_its_markup_stays_text(desktop):
    page = desktop
    set_width(page)
    page.get_by_label("Text", exact=True).fill("<i>slanted</i> &amp; <script>alert(2)</script>")
    page.get_by_role("button", name="Reconstruct and continue").click()
    page.locator("#reconstructed td", has_text=f"with {WIDTH} latents").wait_for()
    assert page.locator("#reconstructed .token").count() > 3
    assert page.locator("#reconstructed i, #reconstructed script").count() == 0
    assert "&amp;" in page.locator("#reconstructed p").first.inner_text()


def test_a_pruned_sae_is_downloaded_and_loads(desktop, tmp_path):
    page = desktop
    set_width(page)
    page.get_by_role("radio", name="energy").first.click()
    page.locator("#figures th", has_text=f"{WIDTH} latents, energy").wait_for()
    page.get_by_role("button", name="Make a download of this pruning").click()
    with page.expect_download() as started:
        page.locator("a[download]").first.click()
    started.value.save_as(tmp_path / "pruned.zip")
    with zipfile.ZipFile(tmp_path / "pruned.zip") as file:
        file.extractall(tmp_path)
    pruned = AutoModel.from_pretrained(tmp_path / f"embedded-energy-{WIDTH}")
    whole = AutoModel.from_pretrained(embedded_sae_path())
    assert pruned.config.num_latents == WIDTH and pruned.prefix_widths == [64, 192, WIDTH]
    assert sorted(pruned.latent_ids.tolist()) == list(range(WIDTH))
    assert torch.equal(pruned.W_dec, whole.W_dec[pruned.latent_ids])


def test_a_pruned_sae_is_pushed_opened_and_indexed(open_page):
    SERVER.reset()
    page = open_page("?width=64")
    rest(page)
    page.get_by_label("or push it to your repository").fill("somebody/pruned")
    page.get_by_label(re.compile("Token with write access")).fill("hf_loopback")
    page.get_by_role("button", name="Push to the Hub").click()
    page.get_by_text("Pushed:").wait_for()
    open_source(page, "somebody/pruned")
    page.locator("#about", has_text=re.compile(r"64 latents.*no feature index")).wait_for()
    choose_tab(page, "Features")
    assert page.get_by_text("There is no index to read from").is_visible()
    page.get_by_label("number input for Tokens of text to look at").fill("10000")
    page.get_by_role("button", name="Build the index").click()
    page.locator("#latents a[data-latent]").first.click()
    page.locator("#feature h2").wait_for()
    assert not page.get_by_role("button", name="Build the index").is_visible()


def test_a_feature_is_opened_from_the_table(page):
    choose_tab(page, "Features")
    link = page.locator("#latents a[data-latent]").nth(5)
    latent = link.get_attribute("data-latent")
    link.focus()
    page.keyboard.press("Enter")
    page.locator("#feature h2", has_text=f"Latent {latent} ").wait_for()
    feature = page.locator("#feature")
    for title in ("How strongly it fires", "Tokens it promotes and suppresses", "Nearest decoder rows"):
        assert feature.get_by_role("heading", name=title).is_visible()
    assert feature.locator(".contexts li").count() >= 10
    assert feature.get_by_text("Prefixes that contain it").is_visible()
    feature.get_by_text("The same as text").first.click()
    assert "[[" in feature.locator("pre").first.inner_text()
    assert f"latent={latent}" in page.url


def test_the_table_of_features_is_sorted_and_searched(desktop):
    page = desktop
    choose_tab(page, "Features")
    page.get_by_label("Fires on a token with").fill("return")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#latents tbody tr').length < 40")
    rows = page.locator("#latents tbody tr").all_inner_texts()
    assert rows and all("return" in row.lower() for row in rows)


def test_a_pattern_finds_what_it_says(page):
    choose_tab(page, "Search")
    page.get_by_label("Pattern or words").fill(r"[re `\s?\d+`]")
    page.get_by_role("button", name="Search", exact=True).click()
    hit = page.locator("#hits a[data-latent]").first
    latent = hit.get_attribute("data-latent")
    hit.click()
    page.locator("#feature h2", has_text=f"Latent {latent} ").wait_for()
    peaks = page.locator("#feature .contexts").first.locator("mark").all_inner_texts()
    assert len(peaks) >= 10
    assert sum(bool(re.fullmatch(r"\s?\d+", peak)) for peak in peaks) >= 0.9 * len(peaks)


def test_a_tree_unfolds(page):
    choose_tab(page, "Tree")
    first = page.locator("#tree details").first
    assert not first.locator("ul").first.is_visible()
    first.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert first.locator("ul").first.is_visible()
    child = first.locator("ul a[data-latent]").first
    latent = child.get_attribute("data-latent")
    child.click()
    page.locator("#feature h2", has_text=f"Latent {latent} ").wait_for()
    assert page.locator("#feature").get_by_text("Refines").is_visible()


def test_a_text_is_tried_and_steered_and_its_markup_stays_text(page):
    choose_tab(page, "Try it")
    page.get_by_label("Your text").fill('<img src=x onerror="document.title=1"> <b>42</b> <script>alert(1)</script>')
    page.get_by_role("button", name="Show its features").click()
    page.locator("#text-features h3", has_text="Token by token").wait_for()
    assert page.locator("#text-features img, #text-features b, #text-features script").count() == 0
    assert page.title() != "1"
    page.get_by_label("Latent to change").fill("42")
    page.get_by_role("button", name="Continue both ways").click()
    page.locator("#steered td", has_text="latent 42 +").wait_for()
    page.get_by_label("One latent along the text").fill("42")
    page.get_by_role("button", name="Follow").click()
    page.locator("#along .token").first.wait_for()


def test_two_prunings_are_compared_and_their_latents_lead_to_their_page(page):
    choose_tab(page, "Compare")
    page.get_by_role("button", name="Compare").last.click()
    page.locator("#comparison h3", has_text="Which features survive").wait_for()
    assert page.locator("#comparison polyline").count() == 2
    assert "512 latents are in both" in page.locator("#comparison").inner_text()
    link = page.locator("#comparison a[data-latent]").first
    latent = link.get_attribute("data-latent")
    rest(page)
    link.click()
    page.locator("#feature h2", has_text=f"Latent {latent} ").wait_for()


def test_nothing_is_wider_than_a_phone(visits):
    page = visits.shared(360)
    for name in ("Prune", "Features", "Search", "Tree", "Try it", "Compare"):
        choose_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_markup_in_a_link_is_text(open_page):
    for names in (["sae", "tab", "width", "latent", "ranking", "kind"], ["place"]):
        page = open_page(f"?{urlencode(dict.fromkeys(names, MARKUP))}")
        page.locator(".toast-body", has_text="<form").first.wait_for()
        assert page.locator(".toast-body form, .toast-body img, form[action*=evil]").count() == 0


def test_going_back_leads_to_the_latent_before(desktop):
    page = desktop
    choose_tab(page, "Features")
    page.get_by_label("Latent", exact=True).fill("7")
    page.get_by_label("Latent", exact=True).press("Enter")
    page.locator("#feature h2", has_text="Latent 7 ").wait_for()
    page.wait_for_function("new URLSearchParams(location.search).get('latent') == '7'")
    page.locator("#latents a[data-latent]:not([data-latent='7'])").first.click()
    page.wait_for_function("new URLSearchParams(location.search).get('latent') != '7'")
    rest(page)
    page.go_back()
    page.locator("#feature h2", has_text="Latent 7 ").wait_for()


def test_saes_of_other_families_and_sizes_open(open_page, tmp_path):
    place = {"base_model": "embedded", "hookpoint": "model.layers.2"}
    ReluSAE(ReluSAEConfig(d_in=128, num_latents=300, **place)).save_pretrained(tmp_path / "a" / "model.layers.2")
    TopKSAE(TopKSAEConfig(d_in=128, num_latents=200, k=5, **place)).save_pretrained(tmp_path / "b" / "model.layers.2")
    page = open_page(f"?{urlencode({'sae': str(tmp_path)})}")
    page.locator("#about", has_text="relu_sae").wait_for()
    page.locator("#figures th", has_text="300 latents").wait_for()
    assert not page.get_by_label("number input for k: latents per token").is_visible()
    rest(page)
    page.get_by_label("Which of its SAEs").click()
    page.get_by_role("option", name="b/model.layers.2").click()
    page.locator("#about", has_text="topk_sae").wait_for()
    page.locator("#figures th", has_text="200 latents").wait_for()
    assert page.get_by_label("number input for k: latents per token").input_value() == "5"
    assert page.locator(".toast-body").count() == 0


def test_a_damaged_index_is_said_and_built_anew(open_page, tmp_path):
    sae, (model, tokenizer) = AutoModel.from_pretrained(embedded_sae_path(), width=48), load_embedded_lm()
    sae.save_pretrained(tmp_path)
    build_index(sae, model, None, 500, tmp_path, tokenizer=tokenizer)
    contexts = tmp_path / "features" / "contexts.parquet"
    content = bytearray(contexts.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    contexts.write_bytes(content)
    page = open_page(f"?{urlencode({'sae': str(tmp_path), 'tab': 'features'})}")
    page.locator("#about", has_text="damaged").wait_for()
    rest(page)
    page.get_by_label("number input for Tokens of text to look at").fill("10000")
    page.get_by_role("button", name="Build the index").click()
    page.locator("#latents a[data-latent]").first.wait_for()
    page.locator("#about", has_text="index of 10,000 tokens").wait_for()


def test_bad_input_is_a_message(open_page):
    page = open_page("?latent=5000&tab=features")
    page.locator(".toast-body", has_text="no latent 5000").wait_for()
    rest(page)
    page.get_by_label("Latent", exact=True).fill("99999")
    page.get_by_role("button", name="Open", exact=True).last.click()
    page.locator(".toast-body", has_text="numbered 0 to 2047").wait_for()
    choose_tab(page, "Search")
    page.get_by_label("Pattern or words").fill("(a")
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator(".toast-body", has_text="(a").wait_for()
    open_source(page, "nobody/nothing")
    page.locator(".toast-body", has_text="'nobody/nothing' cannot be opened").wait_for()


def test_a_link_opens_what_it_says(open_page):
    page = open_page("?sae=embedded&width=192&ranking=frequency&tab=search&latent=7&q=the&kind=words")
    page.locator("#hits tbody tr").first.wait_for()
    assert page.get_by_label("Pattern or words").input_value() == "the"
    assert page.get_by_role("radio", name="words").is_checked()
    choose_tab(page, "Features")
    page.locator("#feature h2", has_text="Latent 7 ").wait_for()
    choose_tab(page, "Prune")
    assert page.get_by_label("number input for Width: latents that are kept").input_value() == "192"
    assert page.get_by_label("frequency").first.is_checked()
