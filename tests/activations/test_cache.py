import json
import random

import pytest
import torch

from hf_matryoshka_sae.activations import (
    ActivationStream,
    CachedActivationStream,
    DatasetConfig,
    IndexedDocuments,
    TokenStream,
    build_cache,
    cache_fingerprint,
    estimate_statistics,
    has_cache,
)

from . import tiny


HOOKPOINTS = ["model.layers.1", "model.layers.0:input"]
ROWS = 900
DATASET = DatasetConfig("embedded")


def _tokens(context_length=16, num_epochs=None, **options):
    documents = IndexedDocuments(tiny.texts(120))
    return TokenStream(documents, tiny.tokenizer(), context_length, 4, num_epochs=num_epochs, **options)


def _source(model, **options):
    return ActivationStream(model, _tokens(), HOOKPOINTS, 24, 400, **options)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def cache(request, tmp_path):
    model, dtype = tiny.llama(), request.param
    fingerprint = cache_fingerprint(model, _tokens(), DATASET, HOOKPOINTS, dtype)
    source = _source(model, dtype=dtype)
    build_cache(tmp_path / "cache", _source(model, dtype=dtype), ROWS, fingerprint)
    rows = torch.cat([_stacked(next(source)) for _ in range(ROWS // 24 + 1)])[:ROWS]
    return tmp_path / "cache", fingerprint, rows


def _stacked(batch):
    return torch.stack([batch[name] for name in HOOKPOINTS], 1)


def _open(cache, **options):
    return CachedActivationStream(cache[0], cache[1], HOOKPOINTS, 30, 300, **options)


def _sorted(rows):
    return rows[sorted(range(len(rows)), key=lambda i: rows[i].flatten().tolist())]


def test_each_cached_row_comes_once_in_an_epoch_unchanged(cache):
    stream = _open(cache)
    # One epoch and what the buffer still holds of it: the buffer may begin the next epoch early.
    rows = torch.cat([_stacked(next(stream)) for _ in range(ROWS // 30)])
    assert rows.dtype == cache[2].dtype and stream.num_cached == ROWS and stream.tokens_seen == ROWS
    known = {tuple(row.flatten().tolist()) for row in cache[2]}
    assert all(tuple(row.flatten().tolist()) in known for row in rows)
    assert not torch.equal(rows, cache[2])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_divide_the_cache(cache, world_size):
    rows = []
    for rank in range(world_size):
        stream = _open(cache, rank=rank, world_size=world_size)
        while True:
            read = stream._read()
            if stream._epoch:
                break
            rows.append(_stacked(read))
    assert torch.equal(_sorted(torch.cat(rows)), _sorted(cache[2]))


def test_resumed_equals_uninterrupted(cache):
    whole = _open(cache, seed=3)
    expected = [_stacked(next(whole)) for _ in range(60)]
    for stop in random.Random(0).sample(range(60), 3):
        part = _open(cache, seed=3)
        for _ in range(stop):
            next(part)
        resumed = _open(cache, seed=3)
        resumed.load_state_dict(part.state_dict())
        assert all(torch.equal(_stacked(next(resumed)), expected[i]) for i in range(stop, 60))


def test_statistics_and_other_types_work_as_with_live_activations(cache):
    stream = _open(cache, dtype=torch.float32)
    found = estimate_statistics(stream, 100)
    assert list(found) == HOOKPOINTS and next(stream)["model.layers.1"].dtype == torch.float32


def test_a_run_may_read_some_of_the_hookpoints(cache):
    folder, fingerprint, _ = cache
    wanted = {**fingerprint, "hookpoints": HOOKPOINTS[:1]}
    batch = next(CachedActivationStream(folder, wanted, HOOKPOINTS[:1], 30, 300))
    assert list(batch) == HOOKPOINTS[:1]


def test_a_finite_stream_gives_a_smaller_cache(tmp_path):
    model = tiny.llama()
    source = ActivationStream(model, _tokens(num_epochs=1), HOOKPOINTS, 24, 400)
    fingerprint = cache_fingerprint(model, _tokens(), DATASET, HOOKPOINTS)
    build_cache(tmp_path / "cache", source, 10**6, fingerprint)
    stream = CachedActivationStream(tmp_path / "cache", fingerprint, HOOKPOINTS, 30, 300)
    assert stream.num_cached == source.tokens_seen > 0


def test_the_fingerprint_follows_what_the_rows_depend_on(tmp_path):
    model = tiny.llama()

    def fingerprint(model=model, tokens=None, dataset=DATASET, hookpoints=HOOKPOINTS, dtype=None, **more):
        return cache_fingerprint(model, tokens or _tokens(), dataset, hookpoints, dtype, **more)

    def changed(**arguments):
        other, same = fingerprint(**arguments), fingerprint()
        json.dumps(other)
        return [name for name in {**same, **other} if same.get(name) != other.get(name)]

    other_model = tiny.llama()
    other_model.load_state_dict(model.state_dict())
    assert changed() == changed(model=other_model) == []
    other_model.model.layers[2].mlp.down_proj.weight.data[3] += 1e-3
    assert changed(model=other_model) == ["model"]
    assert changed(model=tiny.gpt2()) == ["model"]
    assert changed(tokens=_tokens(32)) == ["context_length"]
    assert changed(tokens=_tokens(exclude="none")) == ["exclude"]
    assert changed(dataset=DatasetConfig("embedded", split="heldout")) == ["dataset"]
    assert changed(dtype=torch.bfloat16) == ["dtype"]
    assert changed(max_norm_factor=10.0) == ["max_norm_factor"]
    other_tokenizer = TokenStream(tiny.texts(3), tiny.tokenizer("eos"), 16, 4)
    assert changed(tokens=other_tokenizer) == ["tokenizer"]
    (tmp_path / "a.txt").write_text("one")
    before = fingerprint(dataset=DatasetConfig(str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_text("two")
    assert fingerprint(dataset=DatasetConfig(str(tmp_path / "a.txt"))) != before


class _Interrupted(ActivationStream):
    def __next__(self):
        if self.tokens_seen > 500:
            raise KeyboardInterrupt
        return super().__next__()


def test_a_half_written_cache_is_refused_and_built_anew(tmp_path):
    model, folder = tiny.llama(), tmp_path / "cache"
    fingerprint = cache_fingerprint(model, _tokens(), DATASET, HOOKPOINTS)
    with pytest.raises(ValueError, match="holds no complete activation cache. Build"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 30, 300)
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, _Interrupted(model, _tokens(), HOOKPOINTS, 24, 400), ROWS, fingerprint)
    assert any(folder.iterdir()) and not has_cache(folder)
    with pytest.raises(ValueError, match="not written to its end"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 30, 300)
    build_cache(folder, _source(model), ROWS, fingerprint)
    assert CachedActivationStream(folder, fingerprint, HOOKPOINTS, 30, 300).num_cached == ROWS
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(ValueError, match="holds a complete activation cache"):
        build_cache(folder, _source(model), ROWS, fingerprint)


def test_a_stale_or_damaged_cache_is_refused(tmp_path):
    model, folder = tiny.llama(), tmp_path / "cache"
    fingerprint = cache_fingerprint(model, _tokens(), DATASET, HOOKPOINTS)
    build_cache(folder, _source(model), ROWS, fingerprint)
    for field, value in {"context_length": 32, "format_version": 2, "hookpoints": ["model.layers.2"]}.items():
        with pytest.raises(ValueError, match=f"something else: {field} is .* there, .* here"):
            CachedActivationStream(folder, {**fingerprint, field: value}, HOOKPOINTS, 30, 300)
    with pytest.raises(ValueError, match="fewer than one batch of 500 for each of 2"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 500, 3000, world_size=2)
    shard = sorted(folder.glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"damaged at '{shard.name}'"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 30, 300)
