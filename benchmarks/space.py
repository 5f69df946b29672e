"""How fast the page is: its start, a feature through the API, and many visitors at once.

    python benchmarks/space.py
    python benchmarks/space.py --sae path/to/sae --model path/to/lm --dataset path/to/text.parquet --output space.json

The page runs in a process of its own, as `matryoshka-sae space` starts it. `start` is the time from that command until
the page is served; `open` from a browser's request until the SAE, a feature and its figures are shown (with Playwright
and Chromium, else left out); `feature` a client's call for a latent, latents drawn at random, index read from disk.
Visitors ask for features, tables, trees and now and then for a measurement, all at once.
"""

import argparse
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from gradio_client import Client


CALLS, VISITORS, CALLS_EACH = 50, 20, 10


@contextmanager
def page(arguments: list[str]):
    """The running page's address, and the seconds until it was served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "hf_matryoshka_sae.cli", "space", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"The page ended with status {process.returncode}; run: {' '.join(command)}")
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield url, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def opened_in_browser(url: str) -> dict[str, float]:
    """Seconds until a visitor sees what is open, a feature, and the figures."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return {}
    found = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, query, shown in (
            ("open: the SAE", "", "#about p"),
            ("open: a feature by its link", "?latent=3", "#feature h2"),
            ("open: the figures", "", "#figures table"),
        ):
            tab = browser.new_page()
            began = time.perf_counter()
            tab.goto(url + query)
            tab.locator(shown).wait_for(timeout=120_000)
            found[name] = time.perf_counter() - began
            tab.close()
        browser.close()
    return found


def features(url: str, sae: str, latents: int) -> dict[str, float]:
    """Seconds of single calls, latents drawn at random."""
    client = Client(url, verbose=False)
    client.predict(0, sae, "", api_name="/feature")
    draw, times = random.Random(0), []
    for _ in range(CALLS):
        began = time.perf_counter()
        client.predict(draw.randrange(latents), sae, "", api_name="/feature")
        times.append(time.perf_counter() - began)
    return {
        f"feature: median of {CALLS} calls": statistics.median(times),
        "feature: slowest": max(times),
    }


def visitors(url: str, sae: str, latents: int) -> dict[str, float]:
    """What happens when many visitors ask at once; any error is counted."""

    def visit(number: int) -> tuple[int, list[float]]:
        draw, errors, times = random.Random(number), 0, []
        client = Client(url, verbose=False)
        for call in range(CALLS_EACH):
            began = time.perf_counter()
            try:
                if call == 5 and number % 5 == 0:
                    client.predict(sae, "", "trained", 64 + number, 0, api_name="/measure")
                elif call % 3 == 1:
                    client.predict(sae, "", "frequency", True, "", 40 * number, 40, api_name="/latents")
                elif call % 3 == 2:
                    client.predict(draw.randrange(latents), sae, "", api_name="/family")
                else:
                    client.predict(draw.randrange(latents), sae, "", api_name="/feature")
                times.append(time.perf_counter() - began)
            except Exception as error:  # whatever it is, the visitor saw it
                sys.stderr.write(f"visitor {number}: {error!r}\n")
                errors += 1
        return errors, times

    began = time.perf_counter()
    with ThreadPoolExecutor(VISITORS) as pool:
        found = list(pool.map(visit, range(VISITORS)))
    times = [seconds for _, each in found for seconds in each]
    return {
        f"{VISITORS} visitors, {CALLS_EACH} calls each: errors": sum(errors for errors, _ in found),
        f"{VISITORS} visitors: all done": time.perf_counter() - began,
        f"{VISITORS} visitors: median call": statistics.median(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sae", default="embedded")
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args()
    arguments = [parsed.sae]
    for name in ("model", "dataset"):
        if getattr(parsed, name):
            arguments += [f"--{name}", getattr(parsed, name)]
    with page(arguments) as (url, start):
        found = {"start: the page is served": start}
        about = Client(url, verbose=False).predict(parsed.sae, "", api_name="/describe")
        found |= opened_in_browser(url)
        found |= features(url, parsed.sae, about["num_latents"])
        found |= visitors(url, parsed.sae, about["num_latents"])
    for name, value in found.items():
        sys.stdout.write(f"{name:<50} {value:>10.3f}{'' if 'errors' in name else ' s'}\n")
    if parsed.output:
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        parsed.output.write_text(json.dumps({"sae": about, "figures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
