"""What a latent prints, and labels from elsewhere."""

import gzip
import json

import pytest
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path, load_embedded_lm
from hf_matryoshka_sae.common.token_text import token_texts
from hf_matryoshka_sae.features import FeatureIndex, read_labels

from . import small


@pytest.fixture(scope="module")
def index() -> FeatureIndex:
    return FeatureIndex.open(embedded_sae_path())


def test_a_latent_prints_its_tokens_contexts_and_verdict(index):
    feature = index.feature(5)
    tokenizer = load_embedded_lm()[1]
    text = repr(feature)
    top = feature.top_contexts[0]
    (peak,) = token_texts(tokenizer, [int(top.token_ids[top.peak])])
    assert "latent 5" in text and f"{feature.frequency:.3%}" in text
    assert f"«{peak}»".replace("\n", "⏎") in text and f"{top.value:.3f}" in text
    (promoted,) = token_texts(tokenizer, [feature.promoted[0][0]])
    assert repr(promoted) in text.split("promotes ")[1].split("\n")[0]
    contexts = index.contexts(5)
    assert repr(contexts).splitlines()[0] in text and len(contexts) == len(feature.contexts)
    for html in (feature._repr_html_(), contexts._repr_html_()):
        assert "<table>" in html and "rgba(255,140,0,1.00)" in html and "<script" not in html


def test_without_its_tokenizer_tokens_are_numbers(index):
    told = FeatureIndex(index.about | {"base_model": "/nowhere/at/all"}, index._locate)
    top = told.feature(5).top_contexts[0]
    assert f"«#{top.token_ids[top.peak]}»" in repr(told.contexts(5))
    assert f"«#{top.token_ids[top.peak]}»" in str(told.contexts(5)[0]) and "array" not in str(told.contexts(5)[:2])


def test_labels_are_kept_by_id_through_pruning_and_in_the_folder(tmp_path):
    small.make_sae().save_pretrained(tmp_path)
    small.build(tmp_path)
    index = FeatureIndex.open(tmp_path)
    (tmp_path / "own.csv").write_text("latent_id,label\n3,commas\n1,names of towns\n")
    index.labels |= read_labels(tmp_path / "own.csv")
    index.save_labels(tmp_path)
    again = FeatureIndex.open(tmp_path)
    assert again.labels == {3: "commas", 1: "names of towns"}
    assert again.feature(3).label == "commas" and "latent 3: commas" in repr(again.feature(3))
    sae = AutoModel.from_pretrained(tmp_path).eval()
    from hf_matryoshka_sae.progressive import sort_latents

    order = [3, *(n for n in range(sae.config.num_latents) if n != 3)]
    moved = again.for_sae(sort_latents(sae, order=order, across_groups=True))
    assert moved.feature(0).label == "commas" and "latent 0 (id 3): commas" in repr(moved.feature(0))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv"])
def test_labels_are_read_from_what_others_write(tmp_path, name):
    # As Neuronpedia's export of explanations has them.
    records = [{"modelId": "m", "layer": "0-res", "index": str(n), "description": f"no. {n}, or so"} for n in (7, 2)]
    text = "\n".join(map(json.dumps, records)) if "jsonl" in name else json.dumps(records)
    if name.endswith("sv"):
        text = "Index\tDescription\n7\tno. 7, or so\n2\tno. 2, or so\n"
        text = (
            text
            if name == "a.tsv"
            else text.replace("\tno. 7, or so", ',"no. 7, or so"')
            .replace("\tno. 2, or so", ',"no. 2, or so"')
            .replace("\t", ",")
        )
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_labels(tmp_path / name) == read_labels(tmp_path) == {7: "no. 7, or so", 2: "no. 2, or so"}


@pytest.mark.parametrize(("name", "text"), [("a.csv", "x,y\n1,2\n"), ("a.json", "[1, 2"), ("a.txt", "1: one")])
def test_what_holds_no_labels_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_labels(tmp_path / name)
