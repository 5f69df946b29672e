"""Compare in a real browser: from what is stored, then measured."""

import pytest

from ..conftest import choose_tab, rest, set_width


pytestmark = pytest.mark.slow


def test_two_prunings_are_compared(desktop):
    page = desktop
    set_width(page, 2048)
    choose_tab(page, "Compare")
    outcome = page.locator("#comparison")
    outcome.locator("p", has_text="448 are in both; A alone keeps 1,600, B alone 0").wait_for()
    assert [text[0] for text in outcome.locator("nested-chart .mark text").all_text_contents()] == ["A", "B"]
    page.wait_for_function(
        """() => {
            const blocks = [...document.querySelectorAll("#comparison a.block")];
            return blocks.length > 50 && blocks.every(
                block => block.classList.contains("dim") == block.dataset.latent >= 448);
        }"""
    )
    page.locator("#other-order").get_by_role("radio", name="energy").click()
    outcome.locator("th", has_text="B: 448, energy").wait_for()
    rest(page)
    page.get_by_role("button", name="Measure and compare").click()
    measured = outcome.locator("section", has_text="B: 448, energy").locator("xpath=ancestor::nested-of")
    measured.locator("p", has_text="448 are in both").wait_for()  # what is stored of that order has no such line
    assert "other_ranking=energy" in page.url and "tab=compare" in page.url
    set_width(page, 64, tab="Compare")  # what was said of another width is gone
    outcome.locator("th", has_text="A: 64").wait_for()
    assert outcome.locator("th", has_text="A: 2,048").count() == 0
