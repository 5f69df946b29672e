"""Figures by source are those of the source's text alone; an L0 that is off on one kind of text is told."""

import json

import pytest

from hf_matryoshka_sae import MatryoshkaSAE
from hf_matryoshka_sae.activations import DatasetConfig
from hf_matryoshka_sae.assets.sparse_autoencoder import embedded_sae_path
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.evaluation.sources import (
    figures_by_source,
    heldout_by_source,
    off_target,
    sources_report,
    texts_by_source,
)


PROSE = "The committee will meet on Monday to read the letter, and nobody else was asked to come along. "
CODE = "    for i in range(10):\n        total[i] += values[i] * 3.14159\n    return total\n"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("sources") / "text.jsonl"
    rows = [{"text": text * 20, "source": name} for name, text in (("prose", PROSE), ("code", CODE)) for _ in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return DatasetConfig(str(path), source_column="source")


def test_texts_stop_at_their_size_and_a_column_that_is_not_there_is_named(dataset):
    texts = texts_by_source(dataset, 3000)
    assert list(texts) == ["code", "prose"]
    assert len(texts["prose"]) == -(-3000 // len(PROSE * 20))
    with pytest.raises(ValueError, match="no column 'origin'.*text, source"):
        texts_by_source(DatasetConfig(dataset.path, source_column="origin"), 100)


def test_each_source_has_the_figures_of_its_text_alone(dataset):
    sae = MatryoshkaSAE.from_pretrained(embedded_sae_path())
    data = open_heldout("embedded", sae.config.hookpoint, tokens=64)
    parts = heldout_by_source(data, dataset, context_length=64, tokens=256)
    rows = figures_by_source({"sae": sae}, parts)
    assert [row["source"] for row in rows] == ["code", "prose"]
    for name, row in zip(("code", "prose"), rows, strict=True):
        alone = open_heldout("embedded", sae.config.hookpoint, texts_by_source(dataset, 2048)[name], 256, 64)
        (expected,) = evaluate_fidelity(alone, {"sae": Dictionary(sae, [sae.config.num_latents])})["subjects"]["sae"]
        assert row["l0"] == pytest.approx(expected["l0"])
        assert row["fvu"] == pytest.approx(expected["fvu"])
        assert row["off"] == pytest.approx(expected["l0"] / sae.config.k - 1)
    assert "sae: prose" in str(sources_report(rows))


def test_only_an_l0_that_is_far_off_is_told():
    row = {"subject": "sae", "l0": 21.0, "off": 0.3125, "source": "web"}
    (sentence,) = off_target([row, row | {"source": "news", "l0": 16.5, "off": 0.03}])
    assert "web 21.0 (+31%)" in sentence
    assert "news" not in sentence
    assert off_target([row | {"off": None}]) == []
