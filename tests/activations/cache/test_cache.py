import itertools
import json
import random

import numpy as np
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
    estimate_statistics,
    has_cache,
)
from hf_matryoshka_sae.activations.cache import reader as cache_reader_module
from hf_matryoshka_sae.activations.cache.format import STORED_DTYPES, decode, encode, read_index
from hf_matryoshka_sae.activations.cache.order import ReadingOrder
from hf_matryoshka_sae.activations.cache.storage import CacheStorage

from ...axes import each
from .. import tiny


HOOKPOINTS = ["model.layers.1", "model.layers.0:input"]
ROWS = 900
DATASET = DatasetConfig("embedded")


def _tokens(context_length=16, num_epochs=None, rank=0, world_size=1, **options):
    documents = IndexedDocuments(tiny.texts(120), rank=rank, world_size=world_size)
    return TokenStream(documents, tiny.tokenizer(), context_length, 4, num_epochs=num_epochs, **options)


def _source(model, rank=0, world_size=1, **options):
    return ActivationStream(model, _tokens(rank=rank, world_size=world_size), HOOKPOINTS, 24, 400, **options)


def _fingerprint(model, **more):
    return cache_fingerprint(model, _tokens(), DATASET, HOOKPOINTS, **more)


def _harvested(model, rows=ROWS, **options):
    source = _source(model, **options)
    return torch.cat([_stacked(next(source)) for _ in range(rows // 24 + 1)])[:rows]


TYPES = pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.float16], indirect=True)


@pytest.fixture
def cache(request, tmp_path):
    """A cache, in bfloat16 unless the test names other types, what was asked for, and its rows."""
    model, dtype = tiny.llama(), getattr(request, "param", torch.bfloat16)
    fingerprint = _fingerprint(model)
    build_cache(tmp_path / "cache", _source(model, dtype=dtype), ROWS, fingerprint)
    return tmp_path / "cache", fingerprint, _harvested(model, dtype=dtype)


def _stacked(batch):
    return torch.stack([batch[name] for name in HOOKPOINTS], 1)


def _open(cache, **options):
    return CachedActivationStream(cache[0], cache[1], HOOKPOINTS, 30, 300, **options)


def _sorted(rows):
    return rows[sorted(range(len(rows)), key=lambda i: rows[i].flatten().tolist())]


def _epoch(stream, epoch=0):
    """All rows that a reader gives in one epoch."""
    rows = stream._order.rows_per_epoch
    batches = [_stacked(next(stream)) for _ in range(-(-(epoch + 1) * rows // stream.batch_size))]
    return torch.cat(batches)[epoch * rows : (epoch + 1) * rows]


@TYPES
def test_each_cached_row_comes_once_in_an_epoch_unchanged(cache):
    stream = _open(cache)
    rows = torch.cat([_stacked(next(stream)) for _ in range(ROWS // 30)])
    assert rows.dtype == cache[2].dtype and stream.num_cached == ROWS and stream.tokens_seen == ROWS
    assert torch.equal(_sorted(rows), _sorted(cache[2])) and not torch.equal(rows, cache[2])
    again = torch.cat([_stacked(next(stream)) for _ in range(ROWS // 30)])
    assert torch.equal(_sorted(again), _sorted(rows)) and not torch.equal(again, rows)


@each(world_size=[1, 2, 3, 7], epoch=[0, 2])
def test_readers_divide_the_cache(cache, world_size, epoch):
    parts = [_epoch(_open(cache, rank=rank, world_size=world_size), epoch) for rank in range(world_size)]
    assert torch.equal(_sorted(torch.cat(parts)), _sorted(cache[2]))
    assert max(map(len, parts)) - min(map(len, parts)) <= len(_open(cache).index.shards)


@each(rows=[[1] * 12, [5, 1, 1, 2, 1, 1, 30]], world_size=[2, 3])
def test_small_shards_are_divided_evenly(rows, world_size):
    orders = [ReadingOrder(rows, 2, 4, 0, rank, world_size) for rank in range(world_size)]
    counts = [order.rows_per_epoch for order in orders]
    assert sum(counts) == sum(rows) and max(counts) - min(counts) <= 2
    seen = [
        (shard, row)
        for order in orders
        for block in itertools.takewhile(lambda block: not block.epoch, order.blocks(0))
        for shard, first, end in block.runs
        for row in range(first, end)
    ]
    assert sorted(seen) == [(shard, row) for shard, count in enumerate(rows) for row in range(count)]


def test_a_block_mixes_rows_of_many_windows_of_several_shards(tmp_path, monkeypatch):
    """Runs of 32 windows of the eight shards that are open at a time, in no order."""
    model, fingerprint = tiny.llama(), _fingerprint(tiny.llama())
    build_cache(tmp_path, _source(model), 200 * 60, fingerprint)
    monkeypatch.setattr(cache_reader_module, "_RUN_BYTES", 2 * 16 * 4)
    monkeypatch.setattr(cache_reader_module, "_WINDOW_BYTES", 6 * 16 * 4)
    stream = CachedActivationStream(tmp_path, fingerprint, HOOKPOINTS, 150, 2000)
    assert len(stream.index.shards) >= 56
    block = next(stream._order.blocks(0))
    assert len(block.shards) >= 5
    assert all(end - first <= 6 for _, first, end in block.windows)
    assert all(end - first <= 2 for _, first, end in block.runs)
    assert len(block.windows) >= 30
    window_of = [
        next(i for i, (s, a, b) in enumerate(block.windows) if s == shard and a <= first < end <= b)
        for shard, first, end in block.runs
    ]
    assert np.abs(np.corrcoef(window_of, np.arange(len(window_of)))[0, 1]) < 0.4
    rows_of = sorted((shard, row) for shard, first, end in block.runs for row in range(first, end))
    assert rows_of == sorted((shard, row) for shard, first, end in block.windows for row in range(first, end))


def test_neighbours_of_one_epoch_are_not_all_those_of_the_next():
    order = ReadingOrder([1000], 4, 16, 0, 0, 1)
    starts = {0: set(), 1: set()}
    for block in itertools.takewhile(lambda block: block.epoch < 2, order.blocks(0)):
        starts[block.epoch] |= {first for _, first, _ in block.runs}
    assert len(starts[0] & starts[1]) < 0.1 * len(starts[0])


def test_a_position_within_a_run_is_found():
    order = ReadingOrder([50, 33, 7], 4, 12, 5, 0, 1)

    def rows(position):
        for block in order.blocks(position):
            for shard, first, end in block.runs:
                yield from ((block.epoch, shard, row) for row in range(first, end))

    expected = list(itertools.islice(rows(0), 300))
    for position in range(200):
        assert list(itertools.islice(rows(position), 100)) == expected[position : position + 100]


def test_a_batch_is_of_many_runs_however_small(cache):
    stream = _open(cache)
    sizes = [end - first for _, first, end in next(stream._order.blocks(0)).runs]
    assert max(sizes) <= 30 // 16


def test_no_rows_wait(cache):
    stream = _open(cache)
    for _ in range(50):
        next(stream)
        assert len(stream._buffer) == 0


def test_resumed_equals_uninterrupted(cache):
    whole = _open(cache, seed=3)
    expected = [_stacked(next(whole)) for _ in range(80)]
    for stop in random.Random(0).sample(range(80), 6):
        part = _open(cache, seed=3)
        for _ in range(stop):
            next(part)
        resumed = PrefetchedStream(_open(cache, seed=3)) if stop % 2 else _open(cache, seed=3)
        resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
        assert all(torch.equal(_stacked(next(resumed)), expected[i]) for i in range(stop, 80))
        resumed.close()


def test_a_seed_is_an_order(cache):
    one, two, other = (next(_open(cache, seed=seed)) for seed in (1, 1, -2))
    assert torch.equal(_stacked(one), _stacked(two)) and not torch.equal(_stacked(one), _stacked(other))


def test_a_look_ahead_shows_the_next_batches_and_takes_none(cache):
    stream = _open(cache, dtype=torch.float32)
    next(stream)
    seen = torch.cat([_stacked(rows) for rows in stream.peek(200, 64)])
    assert torch.equal(seen, torch.cat([_stacked(next(stream)) for _ in range(7)])[:200])
    assert sum(len(rows[HOOKPOINTS[0]]) for rows in stream.peek(10**6)) == 300  # `buffer_tokens`


def test_statistics_and_other_types_work_as_with_live_activations(cache):
    stream = _open(cache, dtype=torch.float32)
    found = estimate_statistics(stream, 100)
    rows = torch.cat([next(stream)["model.layers.1"] for _ in range(4)])[:100]
    torch.testing.assert_close(found["model.layers.1"].mean, rows.mean(0))
    assert list(found) == HOOKPOINTS and rows.dtype == torch.float32


def test_a_run_may_read_some_of_the_hookpoints(cache):
    folder, fingerprint, _ = cache
    wanted = {**fingerprint, "hookpoints": HOOKPOINTS[:1]}
    batch = next(CachedActivationStream(folder, wanted, HOOKPOINTS[:1], 30, 300))
    assert list(batch) == HOOKPOINTS[:1]


@TYPES
def test_a_run_may_read_any_type_or_ask_for_one(cache):
    stored = read_index(CacheStorage(cache[0])).dtype
    assert next(_open(cache, stored_as=stored, dtype=torch.bfloat16))["model.layers.1"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"dtype is {stored} there, int8 here"):
        _open(cache, stored_as="int8")


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_the_recorded_error_is_that_of_the_rows_read(tmp_path, dtype):
    model, fingerprint = tiny.llama(), _fingerprint(tiny.llama())
    build_cache(tmp_path, _source(model), ROWS, fingerprint, dtype=dtype)
    harvested = _harvested(model)
    stream = CachedActivationStream(tmp_path, fingerprint, HOOKPOINTS, 30, 300, dtype=torch.float32)
    read = _unshuffled(stream)
    for i, hookpoint in enumerate(HOOKPOINTS):
        true, found = harvested[:, i].double(), read[:, i].double()
        fvu = (found - true).square().sum() / (true - true.mean(0)).square().sum()
        assert stream.index.errors[hookpoint] == pytest.approx(float(fvu), rel=1e-6, abs=1e-12)
        assert fvu < {"fp32": 1e-12, "fp16": 1e-6, "bf16": 1e-5, "int8": 1e-4}[dtype]
        assert torch.equal(found, true) == (dtype == "fp32")


def _unshuffled(stream):
    rows = torch.empty(stream.num_cached, len(HOOKPOINTS), 16)
    starts = np.cumsum([0, *(shard.rows for shard in stream.index.shards.values())])
    taken = 0
    for block in stream._order.blocks(0):
        places = np.concatenate([np.arange(starts[s] + i, starts[s] + j) for s, i, j in block.runs])
        rows[places] = _stacked(stream._reader.take(len(places)))
        taken += len(places)
        if taken == stream.num_cached:
            return rows


def test_int8_is_not_harmed_by_massive_channels_and_tokens_or_rows_that_are_not_finite():
    """Two channels 300 and 150 times the others, a token 1000 times the others: each keeps its own precision."""
    rows = torch.randn(500, 64)
    rows[:, 5], rows[:, 9], rows[:, 7] = 300 + 10 * rows[:, 5], -150.0, 0.0
    rows[33] *= 1000
    rows[44, 3] = torch.inf
    arrays = encode("h", rows, "int8")
    out = torch.empty_like(rows)
    raw = {name: values.numpy() for name, values in arrays.items()}
    decode(raw, "h", 0, 500, "int8", out.view(torch.int32).numpy(), out.dtype)
    assert out[44].isnan().all()
    usual = torch.ones(500, dtype=torch.bool)
    usual[[33, 44]] = False
    small = [i for i in range(64) if i not in (5, 7, 9)]
    for columns in (small, [5]):
        true, found = rows[usual][:, columns], out[usual][:, columns]
        error = (found - true).square().sum() / (true - true.mean(0)).square().sum()
        assert error < 3e-4
    assert (out[33] - rows[33]).norm() < 0.03 * rows[33].norm()  # it alone moves channel 9, which has no width else
    assert torch.equal(out[usual][:, 7], rows[usual][:, 7])
    torch.testing.assert_close(out[usual][:, 9], rows[usual][:, 9], rtol=1e-3, atol=0)


def test_a_number_that_a_type_cannot_hold_is_told():
    with pytest.raises(ValueError, match="fp16 cannot hold the hidden states of h: the largest number is 1e.05"):
        encode("h", torch.tensor([[1e5, torch.inf]]), "fp16")
    assert encode("h", torch.tensor([[torch.inf, 1.0]]), "fp16")["h"][0, 0] == torch.inf


def test_a_finite_stream_gives_a_smaller_cache(tmp_path):
    model = tiny.llama()
    source = ActivationStream(model, _tokens(num_epochs=1), HOOKPOINTS, 24, 400)
    fingerprint = _fingerprint(model)
    build_cache(tmp_path / "cache", source, 10**6, fingerprint)
    stream = CachedActivationStream(tmp_path / "cache", fingerprint, HOOKPOINTS, 30, 300)
    assert stream.num_cached == source.tokens_seen > 0


def test_the_fingerprint_follows_what_the_rows_depend_on(tmp_path):
    model = tiny.llama()

    def fingerprint(model=model, tokens=None, dataset=DATASET, hookpoints=HOOKPOINTS, **more):
        return cache_fingerprint(model, tokens or _tokens(), dataset, hookpoints, **more)

    def changed(**arguments):
        other, same = fingerprint(**arguments), fingerprint()
        json.dumps(other)
        return [name for name in {**same, **other} if same.get(name) != other.get(name)]

    other_model = tiny.llama()
    other_model.load_state_dict(model.state_dict())
    assert changed() == changed(model=other_model) == []
    other_model.model.layers[2].mlp.down_proj.weight.data[3] += 1e-3
    assert changed(model=other_model) == ["model"]
    assert changed(model=tiny.gpt2()) == changed(model=tiny.llama().bfloat16()) == ["model"]
    assert changed(tokens=_tokens(32)) == ["context_length"]
    assert changed(tokens=_tokens(exclude="none")) == ["exclude"]
    assert changed(dataset=DatasetConfig("embedded", split="heldout")) == ["dataset"]
    assert changed(max_norm_factor=10.0) == ["max_norm_factor"]
    other_tokenizer = TokenStream(tiny.texts(3), tiny.tokenizer("eos"), 16, 4)
    assert changed(tokens=other_tokenizer) == ["tokenizer"]
    (tmp_path / "a.txt").write_text("one")
    before = fingerprint(dataset=DatasetConfig(str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_text("two")
    assert fingerprint(dataset=DatasetConfig(str(tmp_path / "a.txt"))) != before


def test_a_stale_or_damaged_cache_is_refused(tmp_path):
    model, folder = tiny.llama(), tmp_path / "cache"
    fingerprint = _fingerprint(model)
    build_cache(folder, _source(model), ROWS, fingerprint)
    for field, value in {"context_length": 32, "hookpoints": ["model.layers.2"]}.items():
        with pytest.raises(ValueError, match=f"something else: {field} is .* there, .* here"):
            CachedActivationStream(folder, {**fingerprint, field: value}, HOOKPOINTS, 30, 300)
    with pytest.raises(ValueError, match="fewer than one batch of 500 for each of 2"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 500, 3000, world_size=2)
    shard = sorted(folder.glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"damaged at '{shard.name}'"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 30, 300)
    (folder / "index.json").write_text(json.dumps({"fingerprint": {"format_version": 1}, "shards": {}}))
    with pytest.raises(ValueError, match="version 1 of the format.*reads version 2. Build it anew"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 30, 300)


def test_reading_a_cache_again_is_said_once(cache, caplog):
    stream = _open(cache)
    for _ in range(100):
        next(stream)
    assert caplog.text.count(f"All {ROWS} cached rows have been read once") == 1
    assert has_cache(cache[0])
