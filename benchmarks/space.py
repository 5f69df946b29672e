"""How fast the page is: its start, what a visitor waits for, and what one visitor costs another.

    python benchmarks/space.py
    python benchmarks/space.py --only waits others --output space.json
    python benchmarks/space.py --sae path/to/sae --model path/to/lm --dataset path/to/text.parquet

The page runs in a process of its own, as `matryoshka-sae space` starts it; clients are threads of this one, so both
share the machine. The parts:

- `browser`: from a browser's request until the SAE and the first figures are shown, and from a slider's release until
  the figures of its width are (with Playwright and Chromium, else left out);
- `waits`: a client's first and later calls: a latent, a search, figures of a width, a comparison, a whole curve;
- `others`: a short text read every half second by one visitor, while another has a whole curve measured, and while a
  third asks for a repository on a Hub that does not answer;
- `crowd`: 30 clients for a minute, mostly reading, now and then measuring;
- `memory`: resident memory of the page before and after 500 calls.
"""

import argparse
import functools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradio_client import Client


CLIENTS, SECONDS, CALLS, LATENTS = 30, 60, 500, 20
TEXT = "The module defines a function that returns the number of items in the list."
WIDTHS = (32, 48, 72, 106, 157, 232, 343, 507, 750, 1108, 1639, 2048)
SAE, FIGURES, SLIDER = "#about h1", "#figures table", "#width input[type=range]"


class Page:
    """The page as a process of its own.

    Args:
        arguments (`list[str]`): Of `matryoshka-sae space`.
        hub (`str`, *optional*): Address of the Hub that it asks; by default the real one.
    """

    def __init__(self, arguments: list[str], hub: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        self._command = [sys.executable, "-m", "hf_matryoshka_sae.cli", "space", *arguments, "--port", str(port)]
        self._environment = os.environ | {"HF_HUB_OFFLINE": "0"} | ({} if hub is None else {"HF_ENDPOINT": hub})

    def __enter__(self) -> "Page":
        began = time.perf_counter()
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            if self._process.poll() is not None:
                sys.exit(f"The page ended with status {self._process.returncode}; run: {' '.join(self._command)}")
            try:
                urllib.request.urlopen(self.url, timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        self.start = time.perf_counter() - began
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()

    def client(self) -> Client:
        """A client with a session of its own."""
        return Client(self.url, verbose=False, httpx_kwargs={"timeout": 600})

    def megabytes(self) -> float:
        """Resident memory in units of 10^6 bytes; NaN where the system does not say."""
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except OSError:
            return float("nan")
        return pages * os.sysconf("SC_PAGESIZE") / 1e6

    def computed(self) -> float:
        """Seconds that the page has computed on any core; NaN where the system does not say."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(name: str, times: list[float]) -> Iterator[tuple[str, float]]:
    """Median, 95th percentile and slowest of some times."""
    ordered = sorted(times)
    yield f"{name}: calls", len(times)
    yield f"{name}: median", statistics.median(ordered)
    yield f"{name}: p95", ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    yield f"{name}: slowest", ordered[-1]


def browser(page: Page, sae: str, widths: list[int]) -> Iterator[tuple[str, float]]:
    """Seconds until a visitor sees what is open and its figures, and those of another width."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return
    with sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in ("first visit", "later visit"):
            tab = window.new_page(viewport={"width": 1280, "height": 900})
            tab.set_default_timeout(120_000)
            began = time.perf_counter()
            tab.goto(page.url)
            for shown, where in (("the SAE", SAE), ("figures", FIGURES)):
                tab.locator(where).first.wait_for()
                yield f"{name}: {shown}", time.perf_counter() - began
            tab.wait_for_timeout(2000)
            if name == "later visit":
                slide = functools.partial(_slide, tab, widths[len(widths) // 2] + 1)
                yield "slider's release to its figures", seconds(slide)
            tab.close()
        window.close()


def _slide(tab: Any, width: int) -> None:
    slider = tab.locator(SLIDER).first
    slider.evaluate(
        """(slider, width) => {
            slider.value = width;
            const happened = name => slider.dispatchEvent(new Event(name, {bubbles: true}));
            ['input', 'pointerup', 'change'].forEach(happened);
        }""",
        width,
    )
    tab.locator(FIGURES, has_text=f"{width:,}").first.wait_for()


def waits(page: Page, sae: str, widths: list[int]) -> Iterator[tuple[str, float]]:
    """Seconds of a lone client's calls, and for how many of them the page computed."""
    client, draw, whole = page.client(), random.Random(0), widths[-1]

    def latent() -> None:
        client.predict(draw.randrange(whole), sae, "", api_name="/feature")

    def curve() -> None:
        for job in [client.submit(sae, "", "energy", width, 0, api_name="/measure") for width in widths]:
            job.result()

    yield "latent, first", seconds(latent)
    times = [seconds(latent) for _ in range(LATENTS)]
    yield f"latent, median of {LATENTS}", statistics.median(times)
    yield "latent, slowest", max(times)
    for name, asked in (
        ("text, first", (TEXT, sae, "", 0, 5, "/read_text")),
        ("text, again", (TEXT, sae, "", 0, 5, "/read_text")),
        ("search, first", (r"[re `\s?\d+`]", "pattern", sae, "", 0, 20, "/search")),
        ("search, another", ("[re ` ?the`] .", "pattern", sae, "", 0, 20, "/search")),
        ("figures of the whole", (sae, "", "trained", 0, 0, "/measure")),
        ("figures of a width", (sae, "", "trained", 100, 0, "/measure")),
        ("first figures by energy", (sae, "", "energy", 100, 0, "/measure")),
        ("compare, both new", (sae, "", "trained", 101, sae, "", "energy", 101, "/compare")),
        ("steer, 30 tokens", (TEXT, 3, "add", 1.0, sae, "", 0, 30, 0.0, 0, "/steer")),
    ):
        computed = page.computed()
        yield name, seconds(lambda asked=asked: client.predict(*asked[:-1], api_name=asked[-1]))
        yield f"{name}: computing", page.computed() - computed
    name, computed = f"whole curve by energy, {len(widths)} widths", page.computed()
    yield name, seconds(curve)
    yield f"{name}: computing", page.computed() - computed


def others(page: Page, sae: str, widths: list[int]) -> Iterator[tuple[str, float]]:
    """Seconds of one visitor's short text, over and over, while others ask for much."""
    reader, busy = page.client(), page.client()

    def read() -> None:
        reader.predict(TEXT, sae, "", 0, 5, api_name="/read_text")

    def curve() -> None:
        jobs = [busy.submit(sae, "", "frequency", width, 0, api_name="/measure") for width in widths]
        for job in jobs:
            job.result()

    def unreachable(number: int = 0) -> None:
        try:
            busy.predict(0, f"nobody/nothing-{number}", "", api_name="/feature")
        except Exception as error:  # what the visitor reads
            said.append(str(error))

    said: list[str] = []
    read()
    yield from spread("text, nobody else there", [seconds(read) for _ in range(10)])
    for name, ask in (("text while a curve is measured", curve), ("text while a Hub does not answer", unreachable)):
        with ThreadPoolExecutor(1) as pool:
            job, times = pool.submit(lambda ask=ask: seconds(ask)), []
            while not job.done():
                times.append(seconds(read))
                time.sleep(0.5)
        yield from spread(name, times)
        yield f"{name}: what was waited for", job.result()
    sys.stdout.write(f"an unreachable repository is told: {said[0] if said else 'nothing'}\n")


def crowd(page: Page, sae: str, widths: list[int]) -> Iterator[tuple[str, float]]:
    """What many clients at once wait for; any error is counted."""
    until = threading.Event()

    def visit(number: int) -> tuple[int, list[float]]:
        draw, errors, times, client = random.Random(number), 0, [], clients[number]
        for call in _asked(draw, number, sae, widths):
            if until.is_set():
                break
            try:
                times.append(seconds(lambda call=call: client.predict(*call[:-1], api_name=call[-1])))
            except Exception as error:  # whatever it is, the visitor saw it
                sys.stderr.write(f"visitor {number}: {call[-1]} {error!r}\n")
                errors += 1
        return errors, times

    # Each asks for the description of all endpoints when it connects, which takes longer than what it asks for then.
    clients = [page.client() for _ in range(CLIENTS)]
    timer = threading.Timer(SECONDS, until.set)
    timer.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        visits = list(pool.map(visit, range(CLIENTS)))
    timer.cancel()
    name = f"{CLIENTS} clients for {SECONDS} s"
    times = [seconds for _, each in visits for seconds in each]
    yield f"{name}: errors", sum(errors for errors, _ in visits)
    yield from spread(name, times)


def _asked(draw: random.Random, number: int, sae: str, widths: list[int]) -> Iterator[tuple[Any, ...]]:
    """What a visitor of a crowd asks for, one after the other: arguments, and the endpoint last."""
    whole, turn = widths[-1], number
    while True:
        turn += 1
        if turn % 25 == 0:
            yield sae, "", "trained", draw.choice(widths), 0, "/measure"
        elif turn % 4 == 0:
            yield f"{TEXT} {draw.random()}", sae, "", 0, 5, "/read_text"
        elif turn % 4 == 1:
            yield sae, "", "frequency", True, "", draw.randrange(max(1, whole - 40)), 40, "/latents"
        elif turn % 4 == 2:
            yield draw.randrange(whole), sae, "", "/family"
        else:
            yield draw.randrange(whole), sae, "", "/feature"


def memory(page: Page, sae: str, widths: list[int]) -> Iterator[tuple[str, float]]:
    """Megabytes of the page before and after many calls of all kinds."""
    client = page.client()
    asked = _asked(random.Random(1), 0, sae, widths)
    for done in range(CALLS + 50):
        if done == 50:  # everything that is opened once is open
            yield "memory after 50 calls (MB)", page.megabytes()
        call = next(asked)
        client.predict(*call[:-1], api_name=call[-1])
    yield f"memory after {CALLS} more calls (MB)", page.megabytes()


PARTS = {"browser": browser, "waits": waits, "others": others, "crowd": crowd, "memory": memory}


@contextmanager
def deaf_hub() -> Iterator[str]:
    """The address of a Hub that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sae", default="embedded")
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--deaf", action="store_true", help="the Hub takes connections and never answers")
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args()
    arguments = [parsed.sae]
    for name in ("model", "dataset"):
        if getattr(parsed, name):
            arguments += [f"--{name}", getattr(parsed, name)]
    with deaf_hub() as hub, Page(arguments, hub if parsed.deaf else None) as page:
        about = page.client().predict(parsed.sae, "", api_name="/describe")
        whole = about["num_latents"]
        widths = sorted({max(1, width * whole // WIDTHS[-1]) for width in WIDTHS})
        found = {"start: the page is served": page.start}
        for part in parsed.only:
            for name, value in PARTS[part](page, parsed.sae, widths):
                found[name] = value
                unit = "" if name.endswith((": errors", ": calls", "(MB)")) else " s"
                sys.stdout.write(f"{name:<60} {value:>10.3f}{unit}\n")
                sys.stdout.flush()
    if parsed.output:
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        parsed.output.write_text(json.dumps({"sae": about, "figures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
