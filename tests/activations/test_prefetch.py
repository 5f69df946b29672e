import copy
import gc
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hf_matryoshka_sae.activations import (
    ActivationStream,
    CachedActivationStream,
    DatasetConfig,
    IndexedDocuments,
    PrefetchedStream,
    TokenStream,
    build_cache,
    cache_fingerprint,
)
from hf_matryoshka_sae.activations.stream import to_device

from . import tiny


HOOKPOINTS = ["model.layers.1", "model.layers.0:input"]
BATCH, BUFFER = 24, 400


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not _threads()


def _threads():
    return [thread for thread in threading.enumerate() if thread.name == "activation-reader"]


def _live(model, num_epochs=None, pack=True, **options):
    documents = IndexedDocuments(tiny.texts(120), shuffle=True)
    tokens = TokenStream(documents, tiny.tokenizer(), 16, 4, num_epochs=num_epochs, pack=pack)
    # A copy: hooks of passes in two threads at once would get in each other's way.
    return ActivationStream(copy.deepcopy(model), tokens, HOOKPOINTS, BATCH, BUFFER, **options)


@pytest.fixture(params=["not packed", "outliers left out", "cached"])
def make(request, tmp_path):
    """Makes a plain stream, the same each time."""
    model = tiny.llama()
    if request.param != "cached":
        options = {"not packed": {"pack": False}, "outliers left out": {"max_norm_factor": 1.2}}
        return lambda **more: _live(model, **options.get(request.param, {}), **more)
    fingerprint = cache_fingerprint(model, _live(model).token_stream, DatasetConfig("embedded"), HOOKPOINTS)
    build_cache(tmp_path / "cache", _live(model), 900, fingerprint)
    return lambda **more: CachedActivationStream(tmp_path / "cache", fingerprint, HOOKPOINTS, BATCH, BUFFER, **more)


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _draw(stream, count):
    return [next(stream) for _ in range(count)]


def _until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_batches_are_those_of_the_plain_stream(make):
    plain, ahead = make(), PrefetchedStream(make())
    for i in range(80):
        if i % 17 == 3:
            time.sleep(0.02)  # the reader gets ahead
        assert _equal(next(plain), next(ahead))
        assert ahead.tokens_seen == plain.tokens_seen
    ahead.close()


def test_the_reader_stays_within_half_a_buffer(make):
    ahead = PrefetchedStream(make())
    next(ahead)

    _until(lambda: ahead.reader.held() >= BUFFER // 2)
    time.sleep(0.05)
    assert ahead.reader.held() < BUFFER // 2 + ahead.rows_per_read
    ahead.close()


def test_nothing_is_read_before_the_first_use(make):
    plain = make()
    reads = []
    before = plain._read
    plain._read = lambda: reads.append(threading.current_thread().name) or before()
    ahead = PrefetchedStream(plain)
    ahead.state_dict()
    assert not reads and not _threads()
    list(ahead.peek(10))
    assert reads and set(reads) == {"MainThread"} and not _threads()
    next(ahead)
    _until(lambda: "activation-reader" in reads)
    ahead.close()


def test_peek_shows_the_next_batches_and_uses_nothing_up(make):
    ahead, plain = PrefetchedStream(make()), make()
    for drawn in (0, 3, 11):
        _draw(ahead, drawn), _draw(plain, drawn)
        seen = ahead.tokens_seen
        shown, expected = list(ahead.peek(100, chunk_size=30)), list(plain.peek(100, chunk_size=30))
        assert all(map(_equal, shown, expected)) and len(shown) == len(expected) > 0
        assert ahead.tokens_seen == seen
        first = next(ahead)
        assert _equal(first, next(plain))
        if drawn == 0:  # later the buffer may have to be refilled, which mixes it anew
            assert all(torch.equal(first[name], shown[0][name][:BATCH]) for name in HOOKPOINTS)
    ahead.close()


@pytest.mark.parametrize(("source", "target"), [("plain", "ahead"), ("ahead", "plain")])
def test_a_state_continues_with_and_without_a_thread(make, source, target):
    wrap = {"plain": lambda stream: stream, "ahead": PrefetchedStream}
    expected = _draw(make(), 60)
    queued = set()
    for stop in [0, *random.Random(0).sample(range(50), 4)]:
        part = wrap[source](make())
        _draw(part, stop)
        if source == "ahead" and stop:
            _until(lambda part=part: part.reader.waiting)
        state = part.state_dict()
        queued.add(bool(part.reader and part.reader.waiting))
        resumed = wrap[target](make())
        resumed.load_state_dict(state)
        assert resumed.tokens_seen == stop * BATCH
        assert all(map(_equal, _draw(resumed, 60 - stop), expected[stop:]))
        assert all(map(_equal, _draw(part, 60 - stop), expected[stop:]))  # taking a state changes nothing
        part.close(), resumed.close()
    assert queued == ({False, True} if source == "ahead" else {False})


def test_a_state_from_before_there_was_a_thread_loads(make):
    plain = make()
    _draw(plain, 7)
    state = plain.state_dict()
    state.pop("ahead", None)  # a cache's state never has it
    ahead = PrefetchedStream(make())
    _draw(ahead, 12)  # what it has read ahead is forgotten
    ahead.load_state_dict(state)
    assert all(map(_equal, _draw(ahead, 30), _draw(plain, 30)))
    ahead.close()


@pytest.mark.parametrize("pack", [True, False])
def test_the_end_of_the_data_is_the_same(pack):
    model = tiny.llama()
    plain, ahead = list(_live(model, 1, pack)), PrefetchedStream(_live(model, 1, pack))
    assert all(map(_equal, list(ahead), plain))
    assert ahead.tokens_seen == sum(len(batch[HOOKPOINTS[0]]) for batch in plain)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)
    resumed = PrefetchedStream(_live(model, 1, pack))
    resumed.load_state_dict(ahead.state_dict())
    with pytest.raises(StopIteration):
        next(resumed)
    ahead.close()


def test_an_error_comes_at_its_place_and_a_state_before_it_is_good():
    model = tiny.llama()

    def failing():
        stream = _live(model)
        reads, before = [], stream._read

        def read():
            reads.append(None)
            if len(reads) == 10:
                raise ValueError("no such column")
            return before()

        stream._read = read
        return stream

    def draw_all(stream):
        batches = []
        with pytest.raises(ValueError, match="no such column"):
            while True:
                batches.append(next(stream))
        return batches

    plain, ahead = failing(), PrefetchedStream(failing())
    expected = draw_all(plain)
    first = _draw(ahead, 5)
    _until(lambda: ahead.reader.error is not None)
    state = ahead.state_dict()
    assert all(map(_equal, [*first, *draw_all(ahead)], expected))
    assert all(map(_equal, _draw(ahead, 20), _draw(plain, 20)))  # whoever tries again goes on
    resumed = _live(model)
    resumed.load_state_dict(state)
    assert all(map(_equal, _draw(resumed, len(expected) - 5), expected[5:]))
    ahead.close()


def test_no_thread_outlives_its_use():
    ahead = PrefetchedStream(_live(tiny.llama()))
    next(ahead)
    assert len(_threads()) == 1
    ahead.close()
    ahead.close()
    assert not _threads()
    next(ahead)
    assert len(_threads()) == 1
    ahead.state_dict()
    assert not _threads()
    next(ahead)
    del ahead
    gc.collect()
    assert not _threads()


@pytest.mark.release
def test_a_process_ends_without_close():
    lines = [
        "from hf_matryoshka_sae.activations import PrefetchedStream",
        "from tests.activations import tiny",
        "from tests.activations.test_prefetch import _live",
        "stream = PrefetchedStream(_live(tiny.llama()))",
        "next(stream)",
        "raise SystemExit(3)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "Exception" not in done.stderr and "terminate" not in done.stderr


def test_it_is_used_like_the_stream():
    stream = _live(tiny.llama())
    ahead = PrefetchedStream(stream)
    assert (ahead.hookpoints, ahead.batch_size, ahead.buffer_tokens) == (HOOKPOINTS, BATCH, BUFFER)
    assert ahead.model is stream.model and ahead.token_stream is stream.token_stream and ahead.num_outliers == 0
    assert iter(ahead) is ahead
    with pytest.raises(AttributeError):
        ahead.nothing  # noqa: B018


def test_moving_keeps_values_and_type():
    values = torch.randn(3, 4)
    assert to_device(values, "cpu") is values
    assert torch.equal(to_device(values, "cpu", torch.bfloat16), values.bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lm_device", ["cpu", "cuda"])
def test_batches_on_a_gpu(lm_device):
    model = tiny.llama().to(lm_device)
    plain, ahead = _live(model, device="cuda"), PrefetchedStream(_live(model, device="cuda"))
    for _ in range(60):
        one, other = next(plain), next(ahead)
        assert other[HOOKPOINTS[0]].device.type == "cuda" and _equal(one, other)
    resumed = _live(model, device="cuda")
    resumed.load_state_dict(ahead.state_dict())
    assert all(map(_equal, _draw(ahead, 30), _draw(resumed, 30)))
    ahead.close()
