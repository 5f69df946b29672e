"""Every view, looked at by axe-core: contrast, names, order of headings, nested controls."""

import pytest

from .conftest import choose_tab, rest


axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
pytestmark = pytest.mark.slow

VIEWS = ("Prune", "Explore", "Search", "Text and steer", "Compare")
SERIOUS = ("serious", "critical")


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("?latent=5", id="light"),
        pytest.param("?latent=5&__theme=dark", id="dark", marks=pytest.mark.release),
    ],
)
def test_no_view_has_a_serious_finding(open_page, query):
    page = open_page(query)
    page.locator("#picture svg").first.wait_for(state="attached")
    found = {}
    for view in VIEWS:
        choose_tab(page, view)
        rest(page)
        for finding in axe.Axe().run(page).response["violations"]:
            if finding["impact"] in SERIOUS:
                nodes = [node["html"][:160] for node in finding["nodes"][:3]]
                found[view, finding["id"]] = [len(finding["nodes"]), *nodes]
    assert not found
