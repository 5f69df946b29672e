"""The page in a real browser: links, keyboard, phone, other SAEs, and what is told when something is wrong."""

import re
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig, TopKSAE, TopKSAEConfig

from .conftest import choose_tab, rest, set_width


pytestmark = pytest.mark.slow

MARKUP = '<form action="https://evil.example/"><input><button>Log in</button></form><img src="https://evil.example/p">'
VIEWS = ("Prune", "Explore", "Search", "Text and steer", "Compare")


def open_source(page, source: str) -> None:
    rest(page)
    page.get_by_role("button", name="Open another").click()
    page.get_by_label("SAE: a repository on the Hub").fill(source)
    page.get_by_role("button", name="Open", exact=True).click()


def query_of(page) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(page.url).query))


@pytest.mark.release
def test_nothing_is_wider_than_a_phone(visits):
    page = visits.shared(360)
    for name in VIEWS:
        choose_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name


@pytest.mark.release
def test_markup_in_a_link_is_text(open_page):
    for names in (["sae", "tab", "width", "latent", "ranking", "kind"], ["place"]):
        page = open_page(f"?{urlencode(dict.fromkeys(names, MARKUP))}")
        page.locator(".toast-body", has_text="<form").first.wait_for()
        assert page.locator(".toast-body form, .toast-body img, form[action*=evil]").count() == 0
        assert page.url.endswith("/")  # nothing of what could not be opened stays in the address


def test_a_link_that_is_sent_on_opens_what_was_shown(open_page, visits):
    page = open_page()
    set_width(page, 192)
    choose_tab(page, "Search")
    page.get_by_role("button", name="Copy link").click()
    page.get_by_role("button", name="Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url and query_of(page) == {"width": "192", "tab": "search"}
    other = open_page(link.removeprefix(visits.url))
    assert other.get_by_role("tab", name="Search").get_attribute("aria-selected") == "true"
    assert other.get_by_label("number input for Width: the first n latents").input_value() == "192"


@pytest.mark.release
def test_an_old_link_opens_and_carries_only_what_is_open(open_page):
    page = open_page("?sae=embedded&width=192&ranking=frequency&tab=try&q=the&kind=words&utm_source=x")
    page.wait_for_function("!location.search.includes('utm')")
    assert query_of(page) == {"width": "192", "tab": "text"}
    choose_tab(page, "Prune")
    assert "ranking=frequency" in page.url and "q=" not in page.url
    choose_tab(page, "Search")
    assert "q=the" in page.url and "ranking" not in page.url


@pytest.mark.release
def test_the_page_is_used_by_keyboard_alone(open_page):
    page = open_page("?width=450")
    page.locator("#answer nested-chart .mark").wait_for()
    slider = page.get_by_role("slider", name=re.compile("Width: the first n latents"))
    for _ in range(30):
        page.keyboard.press("Tab")
        if slider.evaluate("slider => slider === document.activeElement"):
            break
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.locator("#figures th", has_text="first 448").wait_for()
    assert slider.evaluate("slider => slider === document.activeElement")
    page.keyboard.press("ArrowLeft")
    page.locator("#figures th", has_text="first 447").wait_for()  # it was measured when the key was let go
    assert slider.evaluate("slider => slider === document.activeElement")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # to the next view
    page.keyboard.press("Enter")
    page.wait_for_function("location.search.includes('tab=explore')")


@pytest.mark.release
def test_saes_of_other_families_and_sizes_open(open_page, tmp_path):
    place = {"base_model": "embedded", "hookpoint": "model.layers.2"}
    ReluSAE(ReluSAEConfig(d_in=128, num_latents=300, **place)).save_pretrained(tmp_path / "a" / "model.layers.2")
    TopKSAE(TopKSAEConfig(d_in=128, num_latents=200, k=5, **place)).save_pretrained(tmp_path / "b" / "model.layers.2")
    page = open_page(f"?{urlencode({'sae': str(tmp_path)})}")
    page.locator("#about", has_text="300 latents, layer 2, no feature index yet").wait_for()
    page.locator("#answer .answer", has_text="How many of 300 latents").wait_for()
    page.get_by_role("button", name="Measure this width").click()
    page.locator("#figures th", has_text="all 300").wait_for()
    rest(page)
    page.get_by_role("button", name="Open another").click()
    page.get_by_label("Which of its SAEs", exact=True).first.click()
    page.get_by_role("option", name="b/model.layers.2").click()
    page.locator("#about", has_text="200 latents").wait_for()
    page.locator("#answer .answer", has_text="How many of 200 latents").wait_for()
    assert page.locator("#figures table").count() == 0
    assert page.locator(".toast-body").count() == 0
    assert query_of(page) == {"sae": str(tmp_path), "place": "b/model.layers.2"}


@pytest.mark.release
def test_a_repository_that_cannot_be_opened_is_told_and_what_was_open_stays(open_page):
    page = open_page("?width=192")
    open_source(page, "nobody/nothing")
    page.locator(".toast-body", has_text="'nobody/nothing' cannot be opened").wait_for()
    assert page.locator("#about h1").inner_text() == "embedded" and page.url.endswith("?width=192")
    assert page.locator("#answer .answer", has_text="of 2,048 latents keep").is_visible()
    broken = open_page("?sae=nobody/nothing&latent=5&width=7")
    broken.locator(".toast-body", has_text="Opening embedded instead").wait_for()
    broken.locator("#answer .answer", has_text="of 2,048 latents keep").wait_for()
    assert broken.url.endswith("/")


@pytest.mark.release
def test_going_back_leads_to_the_sae_before(open_page, tmp_path):
    AutoModel.from_pretrained(embedded_sae_path(), width=48).save_pretrained(tmp_path)
    page = open_page("?width=192")
    open_source(page, str(tmp_path))
    page.locator("#about", has_text="48 latents").wait_for()
    page.wait_for_function("location.search.includes('sae=')")
    assert "width" not in page.url
    rest(page)
    page.go_back()
    page.locator("#about", has_text="2,048 latents").wait_for()
    assert page.url.endswith("?width=192")
