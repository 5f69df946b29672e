"""Latents in a real browser: the drawer, the table, search, a text that is read and steered, names, a picture."""

import re
from urllib.parse import urlencode
from xml.etree import ElementTree

import pytest
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path, load_embedded_lm
from hf_matryoshka_sae.features import build_index

from .conftest import choose_tab, rest


pytestmark = pytest.mark.slow

DIGITS = r"[re `\s?\d+`]"


def write(page, label: str, text: str) -> None:
    """Type into a field as somebody at the keyboard does: Gradio hears of nothing else."""
    field = page.get_by_role("textbox", name=label, exact=True)
    field.fill("")
    field.press_sequentially(text)


def close_drawer(page) -> None:
    if page.locator("#drawer.open").count():
        page.keyboard.press("Escape")
        page.locator("#drawer.open").wait_for(state="detached")


def test_a_latent_for_digits_and_its_family(desktop):
    page = desktop
    close_drawer(page)
    choose_tab(page, "Search")
    page.get_by_role("button", name="numbers", exact=True).click()
    hits = page.locator("#hits tbody tr")
    hits.first.wait_for()
    assert page.locator("#hits caption").inner_text().startswith("Read as the pattern")
    nested = page.locator("#hits td[style*='--depth:1']")
    assert nested.count() >= 1  # a latent for some digits below one for more
    link = hits.first.locator("a[data-latent]")
    latent = link.get_attribute("data-latent")
    link.click()
    page.locator("#latent-head h2", has_text=f"Latent {latent}").wait_for()
    assert "digits" in page.locator("#latent-head .verdict").inner_text()
    peaks = page.locator("#latent-page .contexts").first.locator("mark").all_inner_texts()
    assert len(peaks) == 3 and all(re.fullmatch(r"\s?\d+", peak) for peak in peaks)
    family = page.locator("#latent-page .family")
    shown = "#latent-page .family a.chip:not([hidden])"
    few = page.locator(shown).count()
    family.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    assert page.locator(shown).count() > few >= 1
    labels = page.locator(f"{shown} .label").all_inner_texts()
    assert sum(bool(re.search(r"\d", label)) for label in labels) >= 6  # the digits are together
    page.keyboard.press("End")
    assert page.locator(shown).count() == 0 and family.get_by_text("None with such a score").is_visible()
    rows = page.locator("#latent-page .real tbody tr")
    assert rows.count() == 5 and "random" in page.locator("#latent-page .real thead").inner_text()
    relative = family.locator("a.chip").last
    page.keyboard.press("Home")
    other = relative.get_attribute("data-latent")
    relative.click()
    page.locator("#latent-head h2", has_text=f"Latent {other}").wait_for()
    assert f"latent={other}" in page.url


def test_the_table_opens_a_latent_and_escape_closes_it(desktop):
    page = desktop
    close_drawer(page)
    choose_tab(page, "Explore")
    page.locator("#explore-picture a.block").first.wait_for()
    page.locator("#latents .search-input").fill("return")
    cell = page.locator("#latents [role=gridcell]", has_text="return").first
    cell.wait_for()
    cell.click()
    page.locator("#latent-head h2").wait_for()
    assert "return" in page.locator("#latent-head .naming").input_value().lower()
    assert "latent=" in page.url
    close_drawer(page)
    assert "latent=" not in page.url
    page.locator("#latents .search-input").fill("")


@pytest.mark.release
def test_a_latent_of_the_picture_gets_the_focus_back(desktop):
    page = desktop
    close_drawer(page)
    choose_tab(page, "Explore")
    block = page.locator("#explore-picture a.block[tabindex='-1'], #explore-picture a.block").first
    block.focus()
    page.keyboard.press("Enter")
    page.locator("#latent-head h2").wait_for()
    page.wait_for_function("document.activeElement.closest('.latent-head') !== null")
    close_drawer(page)
    assert page.evaluate("document.activeElement.matches('a.block')")


@pytest.mark.release
def test_a_name_that_a_reader_gives_is_shown_wherever_the_latent_is(open_page):
    page = open_page("?latent=42&tab=explore")
    page.locator("#latent-head h2", has_text="Latent 42").wait_for()
    page.get_by_label("Name of latent 42").fill("my <b>digits</b>")
    page.keyboard.press("Tab")
    child = page.locator("#latent-page .family a.chip").first
    other = child.get_attribute("data-latent")
    child.click()
    page.locator("#latent-head h2", has_text=f"Latent {other}").wait_for()
    rest(page)
    choose_tab(page, "Search")
    page.get_by_role("button", name="numbers", exact=True).click()
    page.locator("#hits a[data-latent='42'] .label", has_text="my <b>digits</b>").wait_for()
    page.evaluate("localStorage.clear()")


@pytest.mark.release
def test_names_of_a_file_are_shown(open_page, tmp_path):
    (tmp_path / "names.csv").write_text("latent_id,label\n42,all the digits\n99999,nobody\n")
    page = open_page("?tab=explore")
    rest(page)
    page.get_by_role("button", name="Names of latents").click()
    page.locator("input[type=file]").last.set_input_files(tmp_path / "names.csv")
    page.get_by_text("1 of 2,048 latents got a name of the file").wait_for()
    page.evaluate("nested.set('latent', 42, false)")
    page.wait_for_function("document.querySelector('#latent-head .naming')?.value === 'all the digits'")
    page.evaluate("localStorage.clear()")


@pytest.mark.release
def test_a_family_is_saved_as_a_picture(open_page, tmp_path):
    page = open_page("?latent=42&tab=explore")
    page.locator("#latent-head h2", has_text="Latent 42").wait_for()
    rest(page)
    page.get_by_role("button", name="Picture", exact=True).click()
    page.locator("#family-card svg.card").wait_for()
    for kind, begin in (("PNG", b"\x89PNG"), ("SVG", b"<svg")):
        with page.expect_download() as started:
            page.get_by_role("button", name=f"Save as {kind}").click()
        started.value.save_as(tmp_path / f"card.{kind}")
        assert (tmp_path / f"card.{kind}").read_bytes().startswith(begin)
    words = " ".join(ElementTree.parse(tmp_path / "card.SVG").getroot().itertext())
    assert "Latent 42" in words and "latent=42" in words


def test_search_tells_words_from_patterns_and_says_where_a_pattern_is_wrong(desktop):
    page = desktop
    close_drawer(page)
    choose_tab(page, "Search")
    write(page, "Words or a pattern", "the")
    page.keyboard.press("Enter")
    page.locator("#hits caption", has_text="Read as words: the").wait_for()
    write(page, "Words or a pattern", "(a | b")
    page.wait_for_function("document.querySelector('#hits table') === null")  # not what it asked for before
    page.keyboard.press("Enter")
    wrong = page.locator("#hits .problem pre")
    wrong.wait_for()
    source, caret = wrong.inner_text().splitlines()[:2]
    assert source.strip() == "(a | b" and caret.index("^") == source.index("b") + 1
    assert "mono" in wrong.evaluate("element => getComputedStyle(element).fontFamily").lower()


def test_a_text_is_read_a_token_clicked_and_steered(page):
    close_drawer(page)
    choose_tab(page, "Text and steer")
    hostile = '<img src=x onerror="document.title=1"> <b>42</b> <script>alert(1)</script>'
    write(page, "Text", hostile)
    assert page.locator("#text-features .reading").count() == 0  # that of the text before
    page.get_by_role("button", name="Read it").click()
    page.locator("#text-features .tok").first.wait_for()
    tokens = page.locator("#text-features .tok")
    assert "".join(tokens.all_inner_texts()).replace(" ", "") == hostile.replace(" ", "")
    assert page.locator("#text-features img, #text-features b, #text-features script").count() == 0
    assert page.title() != "1"
    fires = tokens.filter(has_text="4").first
    fires.click()
    chosen = page.locator("#text-features .told [data-choose][aria-pressed=true]")
    latent = chosen.get_attribute("data-choose")
    assert page.locator("#steer-latent input").input_value() == latent
    assert float(fires.evaluate("token => token.style.getPropertyValue('--share')")) > 0
    page.get_by_role("button", name="Continue with and without it").click()
    page.locator("#steered h3", has_text=f"Latent {latent} +").wait_for()
    assert page.locator("#steered section").count() == 2
    rest(page)
    page.get_by_role("button", name="Its parent or child").click()
    page.wait_for_function("document.querySelector('#steered section') === null")  # of other controls


def test_the_drawer_steers_its_latent_and_finds_its_like(open_page):
    page = open_page("?latent=42")
    page.locator("#latent-head h2", has_text="Latent 42").wait_for()
    rest(page)
    page.get_by_role("button", name="Steer this").click()
    page.locator("#steering").wait_for()
    page.wait_for_function("document.querySelector('#steer-latent input').value === '42'")
    page.get_by_role("button", name="Find its like").click()
    page.locator("#hits a[data-latent='42']").wait_for()
    assert page.get_by_label("Words or a pattern").input_value().startswith("([re `")


def test_the_sample_follows_the_width_without_the_server(open_page):
    page = open_page("?tab=text")
    page.locator("#text-features .tok").first.wait_for()
    rest(page)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    colours = "[...document.querySelectorAll('#text-features .tok')].map(t => t.getAttribute('style'))"
    before, written = page.evaluate(colours), page.locator("#text-features .goes-on").inner_text()
    page.evaluate("nested.chooseWidth(64)")
    assert page.evaluate(colours) != before
    assert page.locator("#text-features .goes-on").inner_text() != written
    assert asked == []


@pytest.mark.release
def test_a_latents_link_lands_on_the_latent_on_a_phone(visits):
    page = visits.open("?latent=42", width=360)
    heading = page.locator("#latent-head h2", has_text="Latent 42")
    heading.wait_for()
    place = heading.bounding_box()
    assert 0 <= place["y"] < 900 and 0 <= place["x"] < 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Close", exact=True).click()
    page.locator("#drawer.open").wait_for(state="detached")
    rest(page)
    page.close()


@pytest.mark.release
def test_a_damaged_index_is_said_and_built_anew(open_page, tmp_path):
    sae, (model, tokenizer) = AutoModel.from_pretrained(embedded_sae_path(), width=48), load_embedded_lm()
    sae.save_pretrained(tmp_path)
    build_index(sae, model, None, 500, tmp_path, tokenizer=tokenizer, showcase=False)
    contexts = tmp_path / "features" / "contexts.parquet"
    content = bytearray(contexts.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    contexts.write_bytes(content)
    page = open_page(f"?{urlencode({'sae': str(tmp_path), 'tab': 'explore'})}")
    page.locator("#about", has_text="damaged").wait_for()
    rest(page)
    page.get_by_label("number input for Tokens of text to look at").fill("10000")
    page.get_by_role("button", name="Build the index").click()
    page.locator("#latents [role=gridcell]").first.wait_for(timeout=180_000)
