"""Many visitors: nobody waits for what somebody else asked for, longer than for a turn of the same kind."""

import threading
import time
from contextlib import contextmanager

import pytest

from hf_matryoshka_sae.space.subject.lanes import LANES


gradio = pytest.importorskip("gradio")

TEXT = "The function returns a new list."


@pytest.fixture
def lanes(endpoints):
    endpoints.read_text(TEXT)  # the model is loaded
    return endpoints.library.lanes


@contextmanager
def held(*lanes):
    """Somebody runs something long in each of the lanes."""
    inside, leave = threading.Barrier(len(lanes) + 1), threading.Event()

    def hold(lane):
        with lane.turn():
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=hold, args=[lane]) for lane in lanes]
    for thread in threads:
        thread.start()
    inside.wait()
    try:
        yield
    finally:
        leave.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    "lane, ask",
    [
        ("text", lambda endpoints: endpoints.read_text(TEXT)),
        ("text", lambda endpoints: endpoints.activations(TEXT, 3)),
        ("generation", lambda endpoints: endpoints.steer(TEXT, 3, new_tokens=1)),
        ("generation", lambda endpoints: endpoints.reconstruct(TEXT, new_tokens=1)),
        ("search", lambda endpoints: endpoints.search("the")),
        ("measure", lambda endpoints: endpoints.measure(width=33)),
    ],
)
def test_what_is_asked_waits_for_its_own_kind_alone(endpoints, lanes, lane, ask):
    with held(*(lanes[other] for other in LANES if other != lane)):
        assert ask(endpoints)
    lanes[lane].most = 0
    try:
        with held(lanes[lane]), pytest.raises(ValueError, match="others wait for this"):
            endpoints.measure(width=34) if lane == "measure" else ask(endpoints)
    finally:
        lanes[lane].most = 32


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda endpoints: endpoints.measure(width=10**6), "width"),
        (lambda endpoints: endpoints.measure(ranking="beauty"), "Rankings"),
        (lambda endpoints: endpoints.search("[re `(`]"), "cannot be read"),
        (lambda endpoints: endpoints.search("[re `(?:word){e<=2}`]"), "match exactly"),
        (lambda endpoints: endpoints.search("the", kind="beauty"), "Search is for"),
        (lambda endpoints: endpoints.read_text(""), "Write or paste"),
        (lambda endpoints: endpoints.activations(TEXT, 10**6), "numbered"),
        (lambda endpoints: endpoints.reconstruct(TEXT, new_tokens=101), "100 tokens"),
        (lambda endpoints: endpoints.steer(TEXT, 3, mode="push"), "mode"),
        (lambda endpoints: endpoints.compare(other_width=10**6), "width"),
        (lambda endpoints: endpoints.read_text(TEXT, "nobody/nothing"), "'nobody/nothing' cannot be opened"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_waited_for(endpoints, lanes, ask, message):
    with held(*lanes.values()), pytest.raises(ValueError, match=message):
        ask(endpoints)


def test_what_is_stored_needs_no_language_model(monkeypatch):
    from hf_matryoshka_sae.space import Library
    from hf_matryoshka_sae.space.endpoints import Endpoints
    from hf_matryoshka_sae.space.subject import reader

    monkeypatch.setattr(reader.Reader, "text", lambda *_: pytest.fail("the language model was loaded"))
    fresh = Endpoints(Library(tokens=300))
    about = fresh.describe()
    assert about["num_latents"] == 2048 and about["tokens"] == 300 and about["generates"]
    assert fresh.feature(3)["contexts"] and fresh.latents(count=1) and fresh.family(3)
    assert fresh.showcase("embedded", "")["curve"]


def until(true, seconds: float = 10.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.mark.parametrize("how", ["cancels", "leaves"])
def test_who_cancels_or_leaves_gives_up_the_turn(endpoints, lanes, how):
    """Through the page's own server, whose threads go on when nobody wants what they do."""
    import httpx

    from hf_matryoshka_sae.space import build_demo, launch

    page = build_demo(endpoints.library)
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    url, session = f"{url.rstrip('/')}/gradio_api", f"session-{how}"
    (number,) = [index for index, fn in page.fns.items() if fn.api_name == "measure"]
    waiting = lanes["measure"]._waiting
    try:
        with held(lanes["measure"]), httpx.Client(timeout=30) as client:
            asked = {"data": ["embedded", "", "trained", 37, 0], "fn_index": number, "session_hash": session}
            event = client.post(f"{url}/queue/join", json=asked).json()["event_id"]
            with client.stream("GET", f"{url}/queue/data", params={"session_hash": session}) as stream:
                lines = stream.iter_lines()
                next(lines)
                assert until(lambda: len(waiting) == 1)
                if how == "cancels":
                    body = {"session_hash": session, "fn_index": number, "event_id": event}
                    assert client.post(f"{url}/cancel", json=body).json()["success"]
                    assert until(lambda: not waiting)
            assert until(lambda: not waiting)
    finally:
        page.close()
