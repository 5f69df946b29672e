"""The page as a process of its own, and a browser to drive it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from hf_matryoshka_sae.space import Library
from hf_matryoshka_sae.space.endpoints import Endpoints

from ..conftest import SERVER


TOKENS = 4_000
_SECONDS = 180


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


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a chromium on the path")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[1280, 360], ids=["desktop", "phone"])
def any_width(request) -> int:
    """Width of the screen in pixels."""
    return request.param


@pytest.fixture
def open_page(browser, space):
    """Opens the page at a query; at the end nothing may have gone wrong in it."""
    contexts, problems = [], []

    def open_at(query: str = "", width: int = 1280, allowed: tuple[str, ...] = ()):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text)
                if message.type == "error" and not any(text in message.text for text in allowed)
                else None
            ),
        )
        page.goto(space + query)
        page.locator("#about p").wait_for()
        return page

    yield open_at
    seen = list(problems)  # what closing breaks off (a request still under way) is no fault of the page
    for context in contexts:
        context.close()
    assert not seen


def choose_tab(page, name: str) -> None:
    """Go to a tab; on a narrow screen it may be in the menu."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
