"""The page in this process and as a process of its own, and a browser to drive it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest

from hf_matryoshka_sae.space import Library
from hf_matryoshka_sae.space.endpoints import Endpoints

from ..conftest import SERVER


TOKENS = 2_000
_SECONDS = 300  # until the page answers
_REST = 20  # seconds until it is at rest


@pytest.fixture(scope="session")
def endpoints() -> Endpoints:
    """Answers about the embedded SAE, in this process."""
    pytest.importorskip("gradio")
    return Endpoints(Library(tokens=TOKENS))


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> str:
    """The address of the running page, as `matryoshka-sae space` starts it; its Hub is the loopback one."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": SERVER.url,
        "HF_HOME": str(folder / "hf"),
        "HF_MATRYOSHKA_SAE_CACHE": str(folder / "cache"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
    }
    command = [sys.executable, "-m", "hf_matryoshka_sae.cli", "space", "--port", str(port), "--tokens", str(TOKENS)]
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    url = f"http://127.0.0.1:{port}/"
    try:
        _wait(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, f"The page ended:\n{log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"The page was not there after {_SECONDS} s:\n{log.read_text()[-2000:]}")


_STREAMS = WeakKeyDictionary()
"""What each tab waits for from the page's queue."""


class Visits:
    """Tabs of one browser, which reads the page's scripts once for all of them; what goes wrong in any is kept."""

    def __init__(self, context, url: str):
        self.context, self.url = context, url
        self.problems: list[str] = []
        self._shared = {}

    def open(self, query: str = "", width: int = 1280):
        """A new tab at a query."""
        page = self.context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        streams = _STREAMS[page] = set()
        page.on("request", lambda request: streams.add(request) if "/queue/" in request.url else None)
        for ended in ("requestfinished", "requestfailed"):
            page.on(ended, lambda request: streams.discard(request))
        page.goto(self.url + query)
        page.locator("#about h1").wait_for()
        return page

    def shared(self, width: int):
        """The one tab of a width that tests use one after the other."""
        if width in self._shared and not rest(self._shared[width]):
            self._shared.pop(width).close()
            self.problems.clear()  # what closing breaks off
        if width not in self._shared:
            self._shared[width] = self.open(width=width)
            rest(self._shared[width])
        return self._shared[width]

    def check(self) -> None:
        """Nothing has gone wrong since the last check."""
        problems, self.problems = self.problems, []
        assert not problems


@pytest.fixture(scope="session")
def chromium():
    """Tabs of Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a chromium on the path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_context(accept_downloads=True, permissions=["clipboard-read", "clipboard-write"])
        browser.close()


@pytest.fixture(scope="session")
def visits(chromium, space):
    """Visits to the page."""
    return Visits(chromium, space)


@pytest.fixture
def desktop(visits):
    """The page on a desktop, as the test before left it."""
    yield visits.shared(1280)
    visits.check()


@pytest.fixture(params=[1280, 360], ids=["desktop", "phone"])
def page(visits, request):
    """The page on a desktop and on a phone, as the test before left it."""
    yield visits.shared(request.param)
    visits.check()


@pytest.fixture
def open_page(visits):
    """Opens the page at a query, for this test alone."""
    opened = []

    def open_at(query: str = ""):
        opened.append(visits.open(query))
        return opened[-1]

    yield open_at
    problems = list(visits.problems)  # what closing breaks off (a request still under way) is no fault of the page
    for page in opened:
        page.close()
    visits.problems.clear()
    assert not problems


def choose_tab(page, name: str) -> None:
    """Go to a tab, which may be in the menu on a narrow screen, and wait until the page is at rest."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    rest(page)


def rest(page) -> bool:
    """Wait until nothing is under way, nor what follows on it; whether that came in time.

    Leaving a page breaks off what is under way, which it reports; and Gradio closes its stream after the last answer,
    and may lose what is asked for in that moment. A stream of which the end was lost stays open: it is not waited for.
    """
    until, quiet = time.monotonic() + _REST, 0
    while quiet < 4 and time.monotonic() < until:
        page.wait_for_timeout(50)
        quiet = 0 if _STREAMS[page] else quiet + 1
    return quiet == 4


def set_width(page, width: int, tab: str = "Prune") -> None:
    """Choose a width for the whole page, as by typing it."""
    choose_tab(page, tab)
    field = page.get_by_label("number input for Width: the first n latents")
    field.fill(str(width))
    field.press("Enter")


def figures(page) -> dict[str, str]:
    """The figures of Prune at the page's width, by title."""
    rows = page.locator("#figures tbody tr").all()
    return {row.locator("th").inner_text(): row.locator("td").nth(0).inner_text() for row in rows}
