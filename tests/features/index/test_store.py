import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi, constants

from hf_matryoshka_sae.activations import heldout_batches
from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.features import FeatureIndex, build_tree
from hf_matryoshka_sae.features.index import layout, store
from hf_matryoshka_sae.features.index.layout import CONTEXTS, INDEX, LATENTS

from ...activations import tiny
from .. import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    small.make_sae().save_pretrained(folder)
    small.build(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sae")
    return tmp_path / "sae"


def _plain(feature):
    """A feature as something that `==` compares."""
    parts = {name: [dict(vars(one)) for one in getattr(feature, name)] for name in ("contexts", "bands")}
    found = vars(feature) | parts
    for one in (found, *found["contexts"]):
        one.pop("spell")
    return json.loads(json.dumps(found, default=lambda array: array.tolist()))


def test_datasets_reads_both_files(folder):
    for name in (LATENTS, CONTEXTS):
        data = load_dataset(
            "parquet", data_files=str(folder / "features" / name), split="train", cache_dir=folder / "c"
        )
        assert len(data) == pq.read_metadata(folder / "features" / name).num_rows > 0
    assert data[0]["kind"] == "top" and len(data[0]["token_ids"]) == small.SIZES.context_tokens


def test_nothing_is_read_before_it_is_needed(folder, monkeypatch):
    opened, make = [], pq.ParquetFile
    monkeypatch.setattr(
        store.pq, "ParquetFile", lambda path, **rest: (opened.append(path.name), make(path, **rest))[1]
    )
    index = FeatureIndex.open(folder)
    assert len(index) == small.LATENTS and not opened
    index.table(["frequency"])
    assert opened == [LATENTS]
    index.feature(1, contexts=False)
    assert opened == [LATENTS]
    index.feature(1)
    assert opened == [LATENTS, CONTEXTS]


def test_a_latent_is_read_by_its_row_group(folder, monkeypatch):
    index = FeatureIndex.open(folder)
    every = [_plain(index.feature(latent)) for latent in range(small.LATENTS)]
    monkeypatch.setitem(layout.LATENTS_PER_GROUP, LATENTS, 7)
    monkeypatch.setitem(layout.LATENTS_PER_GROUP, CONTEXTS, 3)
    table = pq.read_table(folder / "features" / LATENTS)
    contexts = pq.read_table(folder / "features" / CONTEXTS)
    latent = contexts["latent"].to_numpy()
    parts = [contexts.filter(pa.array(latent // 3 == part)) for part in range(-(-small.LATENTS // 3))]
    target = folder.parent / "regrouped"
    columns = {name: table[name].combine_chunks() for name in table.schema.names}
    layout.write_index(target, {k: v for k, v in index.about.items() if k not in ("files", "done")}, columns, parts)
    again = FeatureIndex.open(target)
    assert pq.ParquetFile(target / CONTEXTS).num_row_groups == -(-small.LATENTS // 3)
    assert [_plain(again.feature(latent)) for latent in range(small.LATENTS)] == every


def test_dead_latents_have_a_page(tmp_path):
    sae = small.make_sae(activation="relu")
    with torch.no_grad():
        sae.b_enc[:30] = -1e9
    index = small.build(tmp_path, sae=sae)
    feature = index.feature(0)
    assert (feature.count, feature.max, feature.contexts, feature.cofiring) == (0, 0.0, [], [])
    assert feature.quantiles == {} and len(feature.histogram[1]) == 0 and feature.neighbours
    assert index.feature(39).contexts


def test_the_table_sorts_all_latents(folder):
    index = FeatureIndex.open(folder)
    table = index.table(["latent", "frequency", "promoted"])
    assert table.column_names == ["latent", "frequency", "promoted"]
    best = int(np.argmax(table["frequency"].to_numpy()))
    assert index.feature(best).frequency == table["frequency"].to_numpy().max()
    with pytest.raises(ValueError, match="'frequenzy'.*'frequency'"):
        index.table(["frequenzy"])
    with pytest.raises(ValueError, match="0 to 39"):
        index.feature(40)


# Whose index it is


def test_an_index_of_another_sae_is_refused(folder):
    index, sae = FeatureIndex.open(folder), small.make_sae()
    index.check(sae)
    index.check(small.make_sae().bfloat16())
    with pytest.raises(ValueError, match="40 latents, the SAE has 10"):
        index.check(sae.truncate(10))
    other = small.make_sae()
    with torch.no_grad():
        other.W_enc += 0.1
    with pytest.raises(ValueError, match="another SAE"):
        index.check(other)
    with pytest.raises(ValueError, match="of another SAE"):
        index.for_sae(other)


def test_a_sorted_and_pruned_sae_finds_its_latents(folder):
    index, sae = FeatureIndex.open(folder), small.make_sae()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    sae.permute_(order)
    small_sae = sae.truncate(25)
    view = index.for_sae(small_sae)
    view.check(small_sae)
    assert len(view) == 25 and view.table(["latent"])["latent"].to_pylist() == list(range(25))
    place = {old: new for new, old in enumerate(order[:25].tolist())}
    for latent in range(25):
        mine, theirs = view.feature(latent), index.feature(int(order[latent]))
        assert (mine.latent, mine.latent_id) == (latent, theirs.latent_id)
        assert [c.window for c in mine.contexts] == [c.window for c in theirs.contexts]
        assert mine.neighbours == [(place[other], value) for other, value in theirs.neighbours if other in place]
    narrower = view.for_sae(small_sae.truncate(5))
    assert narrower.feature(4).latent_id == int(order[4]) and len(narrower) == 5


class _TenFamilies:
    def add(self, pairs):
        pass

    def reduce(self):
        pass

    def parents(self):
        return torch.where(torch.arange(40) < 10, -1, torch.arange(40) % 10), torch.full((40,), 0.75)


def test_the_table_of_a_pruned_sae_says_what_its_features_say(tmp_path):
    index, sae = small.build(tmp_path, tree=_TenFamilies()), small.make_sae()
    sae.permute_(torch.randperm(40, generator=torch.Generator().manual_seed(0)))
    view = index.for_sae(sae.truncate(25))
    lists = ["neighbours", "neighbour_cosines", "cofiring", "cofiring_rates", "children"]
    table = view.table(["children", "parent_score", *lists[:4], "parent", "latent_id"]).to_pydict()
    assert list(table) == ["children", "parent_score", *lists[:4], "parent", "latent_id"]
    assert view.table(["cofiring_rates"]).to_pydict() == {"cofiring_rates": table["cofiring_rates"]}
    assert view.table(["parent_score"]).to_pydict() == {"parent_score": table["parent_score"]}
    lost = 0
    for latent in range(25):
        feature = view.feature(latent, contexts=False)
        assert table["latent_id"][latent] == feature.latent_id
        assert table["neighbours"][latent] == [other for other, _ in feature.neighbours]
        assert table["neighbour_cosines"][latent] == [value for _, value in feature.neighbours]
        assert table["cofiring"][latent] == [other for other, _ in feature.cofiring]
        assert table["cofiring_rates"][latent] == [value for _, value in feature.cofiring]
        assert table["children"][latent] == feature.children
        assert table["parent"][latent] == (-1 if feature.parent is None else feature.parent)
        assert table["parent_score"][latent] == (feature.parent_score or 0)
        lost += table["parent"][latent] < 0 and index.feature(int(feature.latent_id)).parent is not None
    whole = index.table(lists).to_pydict()
    assert lost and any(table["children"]) and sum(map(len, whole["neighbours"])) > sum(map(len, table["neighbours"]))


# What is damaged


def test_an_unfinished_index_is_refused(copy, tmp_path):
    with pytest.raises(ValueError, match="no finished feature index"):
        FeatureIndex.open(tmp_path)
    about = json.loads((copy / "features" / INDEX).read_text())
    for text in ("", "{", "[]", json.dumps(about | {"done": False}), json.dumps(about | {"format": "other/2"})):
        (copy / "features" / INDEX).write_text(text)
        with pytest.raises(ValueError, match="index"):
            FeatureIndex.open(copy)
    (copy / "features" / INDEX).unlink()
    with pytest.raises(ValueError, match="no finished feature index"):
        FeatureIndex.open(copy)


def test_an_index_that_lacks_what_is_relied_on_is_refused(copy):
    path = copy / "features" / INDEX
    about = json.loads(path.read_text())
    wrong = [
        *({name: None} for name in ("num_latents", "context_length", "files", "probabilities", "tokens", "weights")),
        {"num_latents": "40"},
        {"num_latents": True},
        {"num_latents": 0},
        {"files": {LATENTS: 3}},
        {"files": [1]},
        {"probabilities": ["a"]},
        {"context_length": 1.5},
        {"dataset": "text"},
    ]
    for fields in wrong:
        (name,) = fields
        less = {key: value for key, value in about.items() if key != name}
        path.write_text(json.dumps(less if fields[name] is None else about | fields))
        with pytest.raises(ValueError, match=f"damaged: '{name}' is"):
            FeatureIndex.open(copy)
    path.write_text(json.dumps(about | {"num_latents": 41}))
    with pytest.raises(ValueError, match="damaged: latents.parquet has 40 latents"):
        FeatureIndex.open(copy).feature(0)


def test_what_is_no_folder_and_no_repository_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for source, message in (
        ("/nope", "'/nope' is no folder"),
        ("./nope", "'./nope' is no folder"),
        ("a/b/c", "'a/b/c' is no folder"),
        (tmp_path / "file", "is a file, not a folder"),
        ("someone/nothing", "'someone/nothing' is no folder here, and .* the Hub"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureIndex.open(source)


def test_a_damaged_file_is_refused(copy):
    for name in (LATENTS, CONTEXTS):
        path = copy / "features" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-10])
        with pytest.raises(ValueError, match="damaged"):
            FeatureIndex.open(copy).feature(0)
        path.write_bytes(whole[:200] + b"\0" * 100 + whole[300:])
        with pytest.raises(ValueError, match="damaged"):
            FeatureIndex.open(copy).feature(0)
        path.unlink()
        with pytest.raises(ValueError, match="missing"):
            FeatureIndex.open(copy).feature(0)
        path.write_bytes(whole)
    assert FeatureIndex.open(copy).feature(0).contexts


# From the Hub


def test_contexts_are_downloaded_when_they_are_asked_for(folder, hub):
    api = HfApi()
    api.create_repo("me/sae")
    api.upload_folder(repo_id="me/sae", folder_path=folder / "features", path_in_repo="model.layers.1/features")
    index = FeatureIndex.open("me/sae", subfolder="model.layers.1")

    def cache():
        return {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*.*") if path.parent.name == "features"}

    assert cache() == {INDEX}
    feature = index.feature(0, contexts=False)
    assert cache() == {INDEX, LATENTS}
    assert _plain(index.feature(0))["contexts"] and cache() == {INDEX, LATENTS, CONTEXTS}
    assert feature.latent == 0
    with pytest.raises(ValueError, match="no finished feature index"):
        FeatureIndex.open("me/sae")
    with pytest.raises(ValueError, match="'me/other' is no folder here, and cannot be read from the Hub"):
        FeatureIndex.open("me/other")


def test_a_feature_is_seen_in_under_100_ms(folder):
    index = FeatureIndex.open(folder)
    times = []
    for latent in range(small.LATENTS):
        start = time.perf_counter()
        index.feature(latent)
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.1


@pytest.mark.release
def test_threads_read_the_same_index():
    index = FeatureIndex.open(embedded_sae_path())
    wanted = {latent: _plain(index.feature(latent)) for latent in range(0, 2048, 64)}
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda latent: (latent, _plain(index.feature(latent))), list(wanted) * 12))
    assert all(wanted[latent] == feature for latent, feature in found)


# The tree


def test_the_tree_is_that_of_the_activations_at_any_threshold(folder):
    index, model = FeatureIndex.open(folder), small.language_model()
    batches = heldout_batches(tiny.texts(80), tiny.tokenizer(), small.LENGTH, 600, small.WINDOWS)
    states = list(HeldOut(model, batches, small.HOOKPOINT).activations())
    for threshold in (0.25, 0.6):
        tree, expected = index.tree(threshold=threshold), build_tree(small.make_sae(), states, threshold, show=False)
        assert tree.level.tolist() == expected.level.tolist() and tree.parent.tolist() == expected.parent.tolist()
        joined = tree.parent >= 0
        assert joined.sum() > 3
        torch.testing.assert_close(tree.score[joined], expected.score[joined], atol=1e-6, rtol=0)
    for latent in range(10, small.LATENTS):
        candidates = index.feature(latent, contexts=False).candidates
        assert [score for _, score in candidates] == sorted((score for _, score in candidates), reverse=True)
        assert len(candidates) <= 8 and all(score >= 0.2 and other < 10 for other, score in candidates)


def test_where_a_parent_is_pruned_the_next_candidate_takes_its_place(folder):
    index, sae = FeatureIndex.open(folder), small.make_sae()
    latent = next(n for n in range(small.LATENTS) if len(index.feature(n, contexts=False).candidates) > 1)
    (first, _), (second, score) = index.feature(latent, contexts=False).candidates[:2]
    kept = [n for n in range(small.LATENTS) if n != first]
    sae.permute_(torch.tensor([*kept, first]))
    view = index.for_sae(sae.truncate(len(kept)))
    tree = view.tree([9], threshold=0.2)
    assert int(tree.parent[kept.index(latent)]) == kept.index(second)
    assert float(tree.score[kept.index(latent)]) == pytest.approx(score)


def test_an_index_without_candidates_has_its_parents(folder, copy):
    """As an earlier version wrote it."""
    path = copy / "features" / LATENTS
    table = pq.read_table(path).drop_columns(["candidates", "candidate_scores", "bands", "own_tokens"])
    pq.write_table(table, path, row_group_size=256)
    about = json.loads((copy / "features" / INDEX).read_text())
    about["files"][LATENTS] = path.stat().st_size
    del about["prefix_widths"]
    (copy / "features" / INDEX).write_text(json.dumps(about))
    older, index = FeatureIndex.open(copy), FeatureIndex.open(folder)
    assert older.tree([10]).parent.tolist() == index.tree().parent.tolist() == older.tree([10], 0.3).parent.tolist()
    feature = older.feature(3)
    assert feature.bands == feature.candidates == feature.own_tokens == [] and feature.band_contexts
    assert older.showcase() is None and "own_tokens" not in older.columns
    with pytest.raises(ValueError, match="earlier version and has no column 'bands'"):
        older.table(["bands"])
