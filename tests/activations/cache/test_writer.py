"""Several writers of one cache: in turn, at once, interrupted, disagreeing."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from hf_matryoshka_sae.activations import ActivationStream, CachedActivationStream, build_cache, has_cache
from hf_matryoshka_sae.activations.cache.format import read_index
from hf_matryoshka_sae.activations.cache.storage import CacheStorage
from hf_matryoshka_sae.activations.cache.writer import Moments, missing_writers

from .. import tiny
from .test_cache import HOOKPOINTS, ROWS, _epoch, _fingerprint, _harvested, _sorted, _source, _tokens


def _write(place, model, rank=0, world_size=1, rows=300, source=None, **options):
    source = source or _source(model, rank, world_size)
    build_cache(place, source, rows, _fingerprint(model), rank, world_size, **options)


def _files(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_whoever_is_last_joins_the_parts(tmp_path, order):
    model = tiny.llama()
    for rank in order:
        assert not has_cache(tmp_path)
        _write(tmp_path, model, rank, 3)
    stream = CachedActivationStream(tmp_path, _fingerprint(model), HOOKPOINTS, 30, 300)
    expected = torch.cat([_harvested(model, 300, rank=rank, world_size=3) for rank in range(3)])
    assert stream.num_cached == 900
    assert torch.equal(_sorted(_epoch(stream)), _sorted(expected))
    assert stream.index.errors == dict.fromkeys(HOOKPOINTS, 0.0)
    assert stream.index.widths == dict.fromkeys(HOOKPOINTS, 16)


def test_the_order_of_writers_does_not_change_the_index(tmp_path):
    model = tiny.llama()
    for name, order in {"a": (0, 1), "b": (1, 0)}.items():
        for rank in order:
            _write(tmp_path / name, model, rank, 2, dtype="int8")
    assert (tmp_path / "a/index.json").read_bytes() == (tmp_path / "b/index.json").read_bytes()


def test_the_moments_of_parts_are_those_of_the_whole():
    true, stored = torch.randn(50, 4) * 3 + torch.tensor([100.0, 0, -5, 1]), torch.randn(50, 4)
    true[7, 2] = torch.nan
    cuts = (slice(0, 3), slice(3, 30), slice(30, 30), slice(30, 50))
    first, *others = (Moments.of(true[cut], stored[cut]) for cut in cuts)
    found = sum(others, first)
    kept = torch.arange(50) != 7
    x, y = true[kept].double(), stored[kept].double()
    assert found.rows == 49
    assert found.fvu == pytest.approx(float((x - y).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-9)


class _Interrupted(ActivationStream):
    def __next__(self):
        if self.tokens_seen > 500:
            raise KeyboardInterrupt
        return super().__next__()


def test_an_interrupted_writer_starts_over_and_what_is_complete_stays(tmp_path):
    model, fingerprint = tiny.llama(), _fingerprint(tiny.llama())
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="holds no complete activation cache. Build"):
        CachedActivationStream(folder, fingerprint, HOOKPOINTS, 30, 300)
    _write(folder, model, 0, 2, 600)
    complete = _files(folder)
    broken = _Interrupted(model, _tokens(rank=1, world_size=2), HOOKPOINTS, 24, 400)
    with pytest.raises(KeyboardInterrupt):
        _write(folder, model, 1, 2, 600, broken)
    assert len(_files(folder)) > len(complete) and not has_cache(folder)
    assert missing_writers(CacheStorage(folder)) == [1]
    with pytest.raises(ValueError, match="not written to its end"):
        CachedActivationStream(folder, _fingerprint(model), HOOKPOINTS, 30, 300)
    (folder / "shard-00001-of-00002-000099.safetensors").write_bytes(b"left over")
    _write(folder, model, 0, 2, 600)  # has nothing to do
    _write(folder, model, 1, 2, 600)
    after = _files(folder)
    assert all(after[name] == content for name, content in complete.items())
    assert "shard-00001-of-00002-000099.safetensors" not in after and not list(folder.glob("*.tmp"))
    index = read_index(CacheStorage(folder))
    assert index.rows == 1200 and missing_writers(CacheStorage(folder)) == []
    assert sorted(index.shards) == [name for name in sorted(after) if name.startswith("shard-")]
    with pytest.raises(ValueError, match="holds a complete activation cache"):
        _write(folder, model)
    assert _files(folder) == after


def test_a_lost_index_is_made_again_from_the_records(tmp_path):
    """As when two writers end at once and neither sees the other's record."""
    model = tiny.llama()
    for rank in range(2):
        _write(tmp_path, model, rank, 2)
    index = (tmp_path / "index.json").read_bytes()
    (tmp_path / "index.json").unlink()
    _write(tmp_path, model, 0, 2)
    assert (tmp_path / "index.json").read_bytes() == index


def test_writers_that_disagree_are_told_and_leave_everything(tmp_path):
    model = tiny.llama()
    _write(tmp_path, model, 0, 3)
    before = _files(tmp_path)
    unfinished = (
        r"not complete: of 3 parts \(300 rows each, fp32\) part 1, 2 has not ended. End it, with --shard 1, 2 "
    )
    for options in (dict(world_size=4), dict(rows=301), dict(dtype="int8")):
        with pytest.raises(ValueError, match=unfinished):
            _write(tmp_path, model, 1, **{"world_size": 3, **options})
    with pytest.raises(ValueError, match="another activation cache: model is"):
        build_cache(tmp_path, _source(model, 1, 3), 300, _fingerprint(tiny.llama().bfloat16()), 1, 3)
    fewer = {**_fingerprint(model), "hookpoints": HOOKPOINTS[:1]}
    with pytest.raises(ValueError, match="hookpoints are"):
        build_cache(tmp_path, _source(model, 1, 3), 300, fewer, 1, 3)
    assert _files(tmp_path) == before


def test_a_stream_without_rows_is_told(tmp_path):
    empty = ActivationStream(tiny.llama(), _tokens(num_epochs=1), HOOKPOINTS, 24, 400)
    list(empty)
    with pytest.raises(ValueError, match="gave no hidden states"):
        _write(tmp_path, tiny.llama(), source=empty)


def test_shards_are_plain_safetensors_files(tmp_path):
    model = tiny.llama()
    _write(tmp_path, model, rows=ROWS, dtype="bf16")
    index = json.loads((tmp_path / "index.json").read_text())
    found = torch.cat([load_file(tmp_path / name)[HOOKPOINTS[0]] for name in index["shards"]])
    assert torch.equal(found, _harvested(model)[:, 0].bfloat16())
    assert index["rows"] == ROWS and index["dtype"] == "bf16"


def _one_of_two(rank, folder):
    model = tiny.llama()
    _write(folder, model, rank, 2)
    assert has_cache(folder)  # on every process, as soon as it is through
    CachedActivationStream(folder, _fingerprint(model), HOOKPOINTS, 30, 300, rank=rank, world_size=2)


@pytest.mark.slow
def test_two_processes_of_one_launch_write_one_cache(tmp_path, two_processes):
    two_processes.run(_one_of_two, str(tmp_path))
    torch.manual_seed(0)
    model = tiny.llama()
    stream = CachedActivationStream(tmp_path, _fingerprint(model), HOOKPOINTS, 30, 300)
    expected = torch.cat([_harvested(model, 300, rank=rank, world_size=2) for rank in range(2)])
    assert torch.equal(_sorted(_epoch(stream)), _sorted(expected))
