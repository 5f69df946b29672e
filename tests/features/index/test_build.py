import os
import signal

import pytest
import torch

from hf_matryoshka_sae.activations import DatasetConfig
from hf_matryoshka_sae.activations.text.documents import IndexedDocuments
from hf_matryoshka_sae.features import FeatureIndex, IndexSizes, build_index
from hf_matryoshka_sae.features.index import build as module
from hf_matryoshka_sae.features.index import latent_pass, sources
from hf_matryoshka_sae.features.index.layout import CONTEXTS, INDEX, LATENTS
from hf_matryoshka_sae.features.index.sources import text_digest
from hf_matryoshka_sae.models import TopKSAE, TopKSAEConfig

from ...activations import tiny
from .. import small


FILES = (INDEX, LATENTS, CONTEXTS)


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(latent_pass, "TOKENS_AT_ONCE", 2 * small.WINDOWS * small.LENGTH)


def _bytes(folder):
    return {name: (folder / "features" / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    return small.build(folder), folder


# Numbers of each latent, against N x F activations


def test_firing_equals_the_dense_reference(built):
    index, _ = built
    _, values, tokens = small.dense()
    flat = values.flatten(0, 1).double()
    table = index.table()
    assert index.about["tokens"] == tokens == 600 and len(index) == small.LATENTS
    assert table["count"].to_pylist() == (flat > 0).sum(0).tolist()
    expected = {
        "frequency": (flat > 0).sum(0) / tokens,
        "mean": flat.sum(0) / tokens,
        "mean_square": flat.square().sum(0) / tokens,
        "max": flat.amax(0),
    }
    for name, column in expected.items():
        torch.testing.assert_close(
            torch.tensor(table[name].to_pylist()).double(), column.double(), rtol=1e-5, atol=1e-7
        )


def test_histogram_and_quantiles_follow_the_activations(built):
    index, _ = built
    _, values, _ = small.dense()
    for latent in range(0, small.LATENTS, 7):
        feature = index.feature(latent)
        fired = values[..., latent][values[..., latent] > 0].double()
        edges, counts = map(torch.tensor, feature.histogram)
        # An activation at an edge, up to rounding, may lie on either side of it.
        torch.testing.assert_close(torch.histogram(fired, edges).hist, counts.double(), atol=1, rtol=0)
        assert counts.sum() == len(fired) and counts[0] > 0 and counts[-1] > 0
        for probability, value in feature.quantiles.items():
            below, at_most = (fired < value * 0.88).double().mean(), (fired <= value * 1.13).double().mean()
            assert below <= probability + 1 / len(fired) and at_most >= probability - 1 / len(fired)


def test_first_positions_are_looked_at_although_they_do_not_count(built):
    index, _ = built
    _, counted, _ = small.dense()
    _, every, _ = small.dense(tokens=10**6, exclude="none")
    first = (every[: len(counted), 0] > 0).sum(0)
    share = first / (first + (counted > 0).sum((0, 1))).clamp(min=1)
    assert (counted[:, 0] == 0).all() and share.max() > 0
    torch.testing.assert_close(torch.tensor(index.table()["first_position_share"].to_pylist()), share)


def test_neighbours_and_cofiring_equal_the_dense_reference(tmp_path):
    sizes = IndexSizes(neighbours=3, cofiring=4, cofiring_tokens=600)  # every token: rates are exact
    index, sae = small.build(tmp_path, sizes=sizes), small.make_sae()
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = (rows @ rows.T).fill_diagonal_(-2)
    fires = (small.dense()[1].flatten(0, 1) > 0).double()
    together = (fires.T @ fires / fires.sum(0).clamp(min=1)[:, None]).fill_diagonal_(0)
    for latent in range(small.LATENTS):
        feature = index.feature(latent, contexts=False)
        values, near = cosine[latent].topk(3)
        assert [other for other, _ in feature.neighbours] == near.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in feature.neighbours]), values)
        rates = torch.tensor([rate for _, rate in feature.cofiring])
        torch.testing.assert_close(rates, together[latent].topk(4).values[: len(rates)].float())
        for other, rate in feature.cofiring:
            assert together[latent, other].item() == pytest.approx(rate)


def test_a_tree_is_given_all_pairs_and_asked_for_parents(tmp_path):
    class Tree:
        pairs = reduced = 0

        def add(self, pairs):
            self.pairs += len(pairs.rows)

        def reduce(self):
            self.reduced += 1

        def parents(self):
            parents = torch.full((small.LATENTS,), -1)
            parents[[20, 15, 39]] = torch.tensor([2, 2, 0])
            return parents, torch.full((small.LATENTS,), 0.75)

    tree = Tree()
    index = small.build(tmp_path, tree=tree)
    assert tree.reduced == 1 and tree.pairs == sum(index.table()["count"].to_pylist())
    assert index.feature(2).children == [15, 20] and index.feature(0).children == [39]
    assert (index.feature(20).parent, index.feature(20).parent_score) == (2, 0.75)
    assert (index.feature(2).parent, index.feature(2).parent_score) == (None, None)


# Interruption and several processes


@pytest.mark.parametrize("after", [1, 4])
def test_a_continued_build_has_the_bytes_of_an_uninterrupted_one(built, tmp_path, monkeypatch, after):
    add, calls = module.LatentPass.add, []

    def cut_short(self, chunk):
        calls.append(len(chunk))
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        add(self, chunk)

    monkeypatch.setattr(module.LatentPass, "add", cut_short)
    options = {"save_every": 60}
    with pytest.raises(KeyboardInterrupt):
        small.build(tmp_path, **options)
    with pytest.raises(ValueError, match="no finished feature index"):
        FeatureIndex.open(tmp_path)
    counts = []
    for folder in (tmp_path, tmp_path / "whole"):
        calls.clear()
        monkeypatch.setattr(module.LatentPass, "add", lambda self, chunk: (calls.append(len(chunk)), add(self, chunk)))
        small.build(folder, **options)
        counts.append(len(calls))
    assert counts[0] == counts[1] - after > 0  # what was saved is not done again
    assert _bytes(tmp_path) == _bytes(built[1])
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("where", ["reading", "adding", "writing"])
def test_an_interrupt_keeps_what_was_done(built, tmp_path, monkeypatch, where):
    """Ctrl-C, long before the first state would be saved; it comes while text is read, added up or written."""
    added, harvested, add = [], module.harvested, module.LatentPass.add

    def counted(self, chunk):
        if where == "adding" and len(added) == 1:
            signal.raise_signal(signal.SIGINT)  # in the middle
        add(self, chunk)
        added.append(sum(batch.tokens for batch in chunk))

    def reading(*arguments):
        for number, batch in enumerate(harvested(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    def writing(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.LatentPass, "add", counted)
    with monkeypatch.context() as patch:
        if where != "adding":
            patch.setattr(module, *{"reading": ("harvested", reading), "writing": ("write_index", writing)}[where])
        with pytest.raises(KeyboardInterrupt):
            small.build(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(added) == {"reading": 2, "adding": 2, "writing": len(added)}[where]
    small.build(tmp_path)
    assert sum(added) == 600  # what was done is not done again
    assert _bytes(tmp_path) == _bytes(built[1])


def test_a_state_of_another_text_is_not_continued(tmp_path, monkeypatch):
    texts, path = tiny.texts(80), tmp_path / "text.txt"
    first, second = texts, [*texts[:-1], texts[-1] + " w1"]
    ways = {
        "list": lambda texts: texts,
        "file": lambda texts: path.write_text("\n\n".join(texts)) and str(path),
        "documents": lambda texts: IndexedDocuments(texts[::-1]),
    }
    for name, way in ways.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_index", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                small.build(tmp_path / name, texts=way(first), save_every=60)
        assert list((tmp_path / name / "features" / ".building").iterdir())
        started = []
        monkeypatch.setattr(module.States, "load", _seen(module.States.load, started))
        small.build(tmp_path / name, texts=way(second))
        assert started == [None], name


def _seen(load, results):
    def loaded(self, found):
        results.append(load(self, found))
        return results[-1]

    return loaded


def test_a_state_of_other_settings_is_not_continued(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_index", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small.build(tmp_path, save_every=60, seed=3)
    assert list((tmp_path / "features" / ".building").iterdir())
    small.build(tmp_path, seed=4)
    small.build(tmp_path / "anew", seed=4)
    assert _bytes(tmp_path) == _bytes(tmp_path / "anew")


def test_threads_change_nothing(built, tmp_path, monkeypatch):
    for overlapped in (True, False):
        monkeypatch.setattr(module, "_overlapping", lambda batches, _, way=overlapped: _way(batches, way))
        small.build(tmp_path / str(overlapped))
        assert _bytes(tmp_path / str(overlapped)) == _bytes(built[1])


def _way(batches, overlapped):
    return module.ahead(batches) if overlapped else batches


def _one_of_two(rank, folder):
    assert len(small.build(folder)) == small.LATENTS


@pytest.mark.release
def test_two_processes_give_the_index_of_one(built, tmp_path, two_processes):
    two_processes.run(_one_of_two, tmp_path)
    assert _bytes(tmp_path) == _bytes(built[1])


def _shown_by_two(rank, folder):
    assert small.build(folder, showcase=True).showcase() is not None


@pytest.mark.release
def test_two_processes_measure_what_one_measures(tmp_path, two_processes):
    two_processes.run(_shown_by_two, tmp_path / "two")
    one, two = small.build(tmp_path / "one", showcase=True).showcase(), FeatureIndex.open(tmp_path / "two").showcase()
    assert two["sample"] == one["sample"] and two["tokens"] == one["tokens"]
    for name, rows in one["curve"].items():
        for row, other in zip(rows, two["curve"][name], strict=True):
            assert other["ce"] == pytest.approx(row["ce"]) and other["fvu"] == pytest.approx(row["fvu"], rel=1e-5)


# What is refused


def test_what_cannot_be_indexed_is_refused(tmp_path):
    wide = TopKSAE(TopKSAEConfig(d_in=8, num_latents=4, k=1, base_model="x", hookpoint=small.HOOKPOINT))
    with pytest.raises(ValueError, match=r"\(n, 8\)"):
        small.build(tmp_path, sae=wide)
    with pytest.raises(ValueError, match="no token|no text"):
        small.build(tmp_path, texts=["", "  "])
    with pytest.raises(ValueError, match="does not fill one window"):
        small.build(tmp_path, texts=["w1"])
    with pytest.raises(ValueError, match="No module matches"):
        small.build(tmp_path, hookpoint="model.layer.1")
    with pytest.raises(ValueError, match="`tokens`"):
        small.build(tmp_path, tokens=0)
    with pytest.raises(ValueError, match="`top_contexts`"):
        small.build(tmp_path, sizes=IndexSizes(top_contexts=0))
    with pytest.raises(ValueError, match="output_dir"):
        build_index(small.make_sae(), small.language_model(), ["w1"], tokenizer=tiny.tokenizer())
    path = tmp_path / "text.jsonl"
    path.write_text('{"words": "w1 w2"}\n')
    with pytest.raises(ValueError, match="no column 'text'"):
        small.build(tmp_path, texts=str(path))
    assert not (tmp_path / "features" / INDEX).exists()


def test_a_finished_index_of_another_text_or_size_is_built_anew(tmp_path, monkeypatch):
    texts, path, folder = tiny.texts(80), tmp_path / "text.txt", tmp_path / "folder"
    folder.mkdir()
    changed = [texts[0] + " w1", *texts[1:]]

    def write(place, texts):
        place.write_text("\n\n".join(texts))
        return str(place)

    ways = {
        "list": lambda texts: texts,
        "file": lambda texts: write(path, texts),
        "folder": lambda texts: write(folder / "a.txt", texts) and str(folder),
    }
    for name, way in ways.items():
        small.build(tmp_path / f"of {name}", texts=way(texts))
        with monkeypatch.context() as patch:
            patch.setattr(module, "LatentPass", None)
            assert len(small.build(tmp_path / f"of {name}", texts=way(texts))) == small.LATENTS
            for now, tokens in ((texts, 500), (changed, 600)):
                with pytest.raises(TypeError):
                    small.build(tmp_path / f"of {name}", texts=way(now), tokens=tokens)


def test_large_files_are_told_apart_by_size_and_time(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("some text")
    whole = text_digest(DatasetConfig(str(path)))
    os.utime(path, (1, 1))
    assert text_digest(DatasetConfig(str(path))) == whole
    monkeypatch.setattr(sources, "_READ_WHOLE", 3)
    by_time = text_digest(DatasetConfig(str(path)))
    os.utime(path, (2, 2))
    assert len({whole, by_time, text_digest(DatasetConfig(str(path)))}) == 3
    assert text_digest(DatasetConfig("someone/corpus")) is None and text_digest(DatasetConfig("embedded")) is None


def test_an_index_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "opened_model", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "sae" / "features" / INDEX).mkdir(parents=True)
    for place, message in (("file", "is a file"), ("file/below", "is a file"), ("sae", "is a folder")):
        with pytest.raises(ValueError, match=f"cannot be written.*{message}"):
            small.build(tmp_path / place)
    monkeypatch.setattr(sources.os, "access", lambda place, mode: False)
    with pytest.raises(ValueError, match="no permission to write"):
        small.build(tmp_path / "new" / "place")
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    for name, value in (("W_enc", float("inf")), ("b_enc", float("nan")), ("W_dec", float("nan"))):
        sae = small.make_sae()
        with torch.no_grad():
            getattr(sae, name).view(-1)[3] = value
        with pytest.raises(ValueError, match=f"`{name}` has values that are not finite"):
            small.build(tmp_path, sae=sae)


def test_another_hookpoint_than_the_saes_is_told(tmp_path, caplog):
    small.build(tmp_path, hookpoint=small.HOOKPOINT)
    small.build(tmp_path, hookpoint=f"{small.HOOKPOINT}:output")
    assert "config says" not in caplog.text
    index = small.build(tmp_path, hookpoint="model.layers.0")
    assert index.about["hookpoint"] == "model.layers.0"
    assert "reads 'model.layers.1', as its config says, but the index is built at 'model.layers.0'" in caplog.text


def test_a_folder_of_several_saes_is_refused_with_their_names(tmp_path):
    for place in ("matryoshka/model.layers.1", "topk/model.layers.1"):
        small.make_sae().save_pretrained(tmp_path / "run" / place)
    with pytest.raises(ValueError, match="of one SAE. Name one of: matryoshka/model.layers.1, topk/model.layers.1"):
        build_index(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no SAE"):
        (tmp_path / "empty").mkdir()
        build_index(tmp_path / "empty")
    for nowhere in ("/nope", "./nope", "~/nope", "a/b/c"):
        with pytest.raises(ValueError, match=f"no folder or file '{nowhere}'"):
            build_index(nowhere)


def test_fewer_tokens_than_asked_for_are_told(tmp_path, caplog):
    index = small.build(tmp_path, tokens=10**6)
    assert index.about["tokens"] < 10**6 and "fewer than" in caplog.text


def test_no_path_of_this_machine_is_in_an_index(tmp_path):
    text = tmp_path / "private" / "text.txt"
    text.parent.mkdir()
    text.write_text("def f(x): return x\n\n" * 300)
    sae = TopKSAE(TopKSAEConfig(d_in=128, num_latents=64, k=2, hookpoint="model.layers.1"))
    built = build_index(sae, "embedded", str(text), 500, tmp_path, context_length=32, show=False)
    assert built.about["dataset"]["path"] == "text.txt" and built.about["tokenizer"] == "lm"
    assert str(tmp_path) not in (tmp_path / "features" / "index.json").read_text()


def test_a_cut_sae_does_not_take_the_place_of_the_whole_ones_index(tmp_path):
    whole = TopKSAE(TopKSAEConfig(d_in=128, num_latents=64, k=2, base_model="embedded", hookpoint="model.layers.1"))
    whole.save_pretrained(tmp_path)
    build = dict(tokens=300, context_length=32, show=False)
    build_index(tmp_path, **build)
    loaded = TopKSAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Name an `output_dir`"):
        build_index(loaded.truncate(16), **build)
    with pytest.raises(ValueError, match="Name an `output_dir`"):
        build_index(TopKSAE.from_pretrained(tmp_path, width=16), **build)
    index = FeatureIndex.open(tmp_path)
    index.check(loaded)
    assert len(build_index(loaded, **build)) == 64
    for outside in (-1, 64, 1.5, "3", None, True):
        for read in (index.contexts, index.feature):
            with pytest.raises(ValueError, match="numbered 0 to 63"):
                read(outside)
