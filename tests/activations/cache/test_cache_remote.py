"""Caches that are not in a local folder: in memory, behind plain HTTP, on the (loopback) Hub."""

import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from hf_matryoshka_sae.activations import CachedActivationStream, PrefetchedStream, build_cache, has_cache
from hf_matryoshka_sae.activations.cache import order as cache_order_module
from hf_matryoshka_sae.activations.cache import shards as cache_shards_module
from hf_matryoshka_sae.activations.cache.storage import CacheStorage
from hf_matryoshka_sae.activations.cache.writer import missing_writers

from .. import tiny
from .test_cache import HOOKPOINTS, ROWS, _epoch, _fingerprint, _harvested, _sorted, _source, _stacked


@pytest.fixture
def memory():
    yield "memory://caches/one"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["int8"])
def local(request, tmp_path):
    """A cache in a folder, and what was asked for."""
    model = tiny.llama()
    build_cache(tmp_path / "cache", _source(model), ROWS, _fingerprint(model), dtype=request.param)
    return tmp_path / "cache", _fingerprint(model)


class _Ranges(SimpleHTTPRequestHandler):
    """Files of a folder, with byte ranges; `asked` lists them, and `failing` answers are errors."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        if self.server.failing and "Range" in self.headers:
            self.server.failing -= 1
            return self.send_error(503)
        data, status = path.read_bytes(), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if found:
            self.server.asked.append((path.name, int(found[1]), int(found[2]) + 1))
            data, status = data[int(found[1]) : int(found[2]) + 1], 206
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def http(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=str(tmp_path)))
    server.daemon_threads, server.asked, server.failing = True, [], 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}/cache"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _batches(place, fingerprint, count=70, **options):
    stream = CachedActivationStream(place, fingerprint, HOOKPOINTS, 30, 300, **options)
    return torch.stack([_stacked(next(stream)) for _ in range(count)])


def test_a_cache_in_a_store_is_written_in_parts_and_read_like_a_folder(memory, tmp_path):
    model = tiny.llama()
    for rank in (1, 0):
        assert not has_cache(memory)
        for place in (memory, tmp_path):
            build_cache(place, _source(model, rank, 2), ROWS // 2, _fingerprint(model), rank, 2, "bf16")
        assert missing_writers(CacheStorage(memory)) == ([0] if rank else [])
    found, expected = _batches(memory, _fingerprint(model)), _batches(tmp_path, _fingerprint(model))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    with pytest.raises(ValueError, match="memory://caches/one' holds a complete activation cache"):
        build_cache(memory, _source(model), ROWS, _fingerprint(model))


def test_what_an_interrupted_writer_left_in_a_store_is_replaced(memory):
    model, storage = tiny.llama(), CacheStorage(memory)
    storage.write("shard-00000-of-00001-000077.safetensors", b"left over")
    with pytest.raises(ValueError, match="It was not written to its end"):
        _batches(memory, _fingerprint(model))
    build_cache(memory, _source(model), ROWS, _fingerprint(model))
    assert "shard-00000-of-00001-000077.safetensors" not in storage.names()
    assert torch.equal(
        _sorted(_epoch(CachedActivationStream(memory, _fingerprint(model), HOOKPOINTS, 30, 300))),
        _sorted(_harvested(model)),
    )


def test_a_file_url_is_a_folder(local):
    assert CacheStorage(f"file://{local[0]}").folder == local[0]
    assert torch.equal(_batches(f"file://{local[0]}", local[1]), _batches(*local))


def test_readers_fetch_their_shares_by_byte_ranges(local, http):
    for rank in range(2):
        share = {"rank": rank, "world_size": 2}
        assert torch.equal(_batches(http.url, local[1], **share), _batches(*local, **share))
    fetched = [asked for asked in http.asked if asked[0].startswith("shard-")]
    rows_of = [asked for asked in fetched if asked[2] - asked[1] > 1000]
    assert len(rows_of) == len(set(rows_of))  # none twice, though both went through it more than once
    for one in rows_of:
        assert all(one is other or one[2] <= other[1] or other[2] <= one[1] for other in rows_of if other[0] == one[0])


def test_fewer_hookpoints_are_fewer_bytes(local, http):
    fingerprint = {**local[1], "hookpoints": HOOKPOINTS[:1]}
    next(CachedActivationStream(http.url, fingerprint, HOOKPOINTS[:1], 30, 300))
    sizes = sum(path.stat().st_size for path in local[0].glob("shard-*"))
    assert sum(end - start for name, start, end in http.asked if name.startswith("shard-")) < 0.55 * sizes


def test_the_disk_holds_a_few_shards_and_is_empty_in_the_end(local, http, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_order_module, "SHARDS_AT_ONCE", 1)
    monkeypatch.setattr(cache_shards_module, "SHARDS_AT_ONCE", 1)
    monkeypatch.setattr(cache_shards_module.tempfile, "tempdir", str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    stream = CachedActivationStream(http.url, local[1], HOOKPOINTS, 30, 300)
    assert len(stream.index.shards) > 3
    folder, most = stream._shards._folder, 0
    for _ in range(45):
        next(stream)
        most = max(most, len(list(folder.iterdir())))
    assert 1 <= most <= 3  # two, and one whose fetching had begun
    assert torch.equal(_batches(http.url, local[1]), _batches(*local))
    del stream
    deadline = time.monotonic() + 20
    while list((tmp_path / "disk").iterdir()):  # a fetch under way ends first
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_passing_failure_is_tried_again_and_a_lasting_one_told(local, http, monkeypatch):
    monkeypatch.setattr("hf_matryoshka_sae.activations.cache.storage._WAIT_SECONDS", 0.01)
    expected = _batches(*local, count=40)
    http.failing = 2
    assert torch.equal(_batches(http.url, local[1], count=40), expected)
    stream = CachedActivationStream(http.url, local[1], HOOKPOINTS, 30, 300)
    http.failing = 10**6
    with pytest.raises(OSError, match=r"shard-.* cannot be read: .*503"):
        next(stream)
    http.failing = 0
    assert torch.equal(torch.stack([_stacked(next(stream)) for _ in range(40)]), expected)  # nothing was skipped
    ahead = PrefetchedStream(CachedActivationStream(http.url, local[1], HOOKPOINTS, 30, 300))
    assert torch.equal(torch.stack([_stacked(next(ahead)) for _ in range(40)]), expected)
    ahead.close()


def test_a_shard_cut_short_is_told(local, http, monkeypatch):
    monkeypatch.setattr("hf_matryoshka_sae.activations.cache.storage._WAIT_SECONDS", 0.01)
    for shard in local[0].glob("shard-*"):
        shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(OSError, match="cannot be read"):
        _batches(http.url, local[1])


@pytest.mark.parametrize("place", ["nosuch://bucket/cache", "http://127.0.0.1:9/cache"])
def test_a_place_that_is_not_there_is_told(place):
    with pytest.raises((ValueError, OSError), match="cannot be reached|9"):
        CachedActivationStream(place, {}, HOOKPOINTS, 30, 300)


def test_a_cache_on_the_hub_is_read(local, hub):
    files = {f"states/{path.name}": path.read_bytes() for path in local[0].iterdir()}
    hub.add("datasets/someone/states", files)
    place = "hf://datasets/someone/states/states"
    assert has_cache(place) and not has_cache("hf://datasets/someone/states/other")
    assert torch.equal(_batches(place, local[1]), _batches(*local))
