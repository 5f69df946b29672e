"""An index of three made-up features, and the fields that Neuronpedia's importer reads."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.features.neuronpedia import export_neuronpedia


@pytest.fixture(scope="module")
def tokenizer():
    return load_embedded_lm()[1]


def context(kind: str, ids: list[int], value: float):
    return SimpleNamespace(kind=kind, token_ids=np.array(ids), activations=np.array([0, value]), peak=1, value=value)


class StandIn:
    about = {
        "base_model": "org/some-model",
        "hookpoint": "model.layers.2",
        "dataset": {"path": "a/dataset"},
        "tokens": 1280,
        "context_length": 128,
    }

    def __init__(self, tokenizer):
        self.ids = tokenizer(" the return", add_special_tokens=False)["input_ids"]

    def __len__(self) -> int:
        return 3

    def feature(self, latent: int, contexts: bool = True):
        if not 0 <= latent < 3:
            raise ValueError(f"Latents are numbered 0 to 2, got {latent}.")
        found = [context("top", self.ids, 9.0), context("0", self.ids, 1.0), context("0", self.ids, 2.0)]
        found = [*found, context("1", self.ids, 5.0)]
        return SimpleNamespace(
            latent=latent,
            frequency=[0.1, 0.5, 0.0][latent],
            max=9.0 if latent < 2 else math.nan,
            histogram=(np.array([0.0, 1.0, 3.0]), np.array([5, 7])),
            promoted=[(self.ids[0], 2.5)],
            suppressed=[(self.ids[1], -math.inf)],
            cofiring=[(1, 0.75)] if latent == 0 else [],
            contexts=found if contexts and latent < 2 else [],
        )


def test_batches_hold_the_fields_of_feature_dashboards(tokenizer, tmp_path):
    files = export_neuronpedia(StandIn(tokenizer), tmp_path / "out", tokenizer, batch_size=2, show=False)
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["batch-0.json", "batch-1.json"]
    first, second = (json.loads(file.read_text(), parse_constant=pytest.fail) for file in files)
    assert {key: first[key] for key in first if key != "features"} == {
        "model_id": "some-model",
        "layer": 2,
        "sae_set": "matryoshka",
    }
    assert [feature["feature_index"] for feature in first["features"] + second["features"]] == [0, 1, 2]
    feature = first["features"][0]
    assert feature["pos_str"] == [" the"] and feature["pos_values"] == [2.5]
    assert feature["neg_str"] == [" return"] and feature["neg_values"] == [None]
    assert feature["frac_nonzero"] == 0.1
    assert feature["freq_hist_data_bar_values"] == [0.5, 2.0] and feature["freq_hist_data_bar_heights"] == [5, 7]
    assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"], feature["dataset"]) == (10, 128, "a/dataset")
    # Both fire on 7.5% of tokens; chance would be 5%.
    assert feature["correlated_features_indices"] == [1]
    assert feature["correlated_features_pearson"] == [pytest.approx(0.025 / (0.3 * 0.5), abs=1e-6)]
    assert [context["bin_min"] for context in feature["activations"]] == [-1, 5, 1, 1]
    assert [context["bin_max"] for context in feature["activations"]] == [9, 5, 2, 2]
    assert [context["bin_contains"] for context in feature["activations"]] == [-1, 0.05, 0.05, 0.05]
    strongest = feature["activations"][0]
    assert strongest["tokens"] == [" the", " return"] and strongest["values"] == [0, 9]
    assert strongest["qualifying_token_index"] == 1
    assert second["features"][0]["activations"] == []


def test_some_latents_and_other_names(tokenizer, tmp_path):
    (file,) = export_neuronpedia(
        StandIn(tokenizer), tmp_path, tokenizer, model_id="m", layer=7, sae_set="s", latents=[2, 0], show=False
    )
    found = json.loads(file.read_text())
    assert (found["model_id"], found["layer"], found["sae_set"]) == ("m", 7, "s")
    assert [feature["feature_index"] for feature in found["features"]] == [2, 0]


def test_what_cannot_be_exported_is_said(tokenizer, tmp_path):
    index = StandIn(tokenizer)
    with pytest.raises(ValueError, match="0 to 2, got 3"):
        export_neuronpedia(index, tmp_path / "a", tokenizer, latents=[3], show=False)
    with pytest.raises(ValueError, match="`batch_size`"):
        export_neuronpedia(index, tmp_path / "b", tokenizer, batch_size=0, show=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "batch-0.json").write_text("{}")
    with pytest.raises(ValueError, match="holds batches already"):
        export_neuronpedia(index, tmp_path / "c", tokenizer, show=False)
    index.about = index.about | {"hookpoint": "embed"}
    with pytest.raises(ValueError, match="names no layer"):
        export_neuronpedia(index, tmp_path / "d", tokenizer, show=False)


def test_an_export_that_fails_is_in_nobodys_way(tokenizer, tmp_path):
    index = StandIn(tokenizer)
    with pytest.raises(ValueError, match="0 to 2, got 3"):
        export_neuronpedia(index, tmp_path, tokenizer, latents=[0, 1, 3], batch_size=1, show=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "batch-7.json").write_text("{")  # of one that was killed
    files = export_neuronpedia(index, tmp_path, tokenizer, batch_size=1, show=False)
    assert sorted(tmp_path.iterdir()) == files and len(files) == 3
    with pytest.raises(ValueError, match="cannot be written"):
        export_neuronpedia(index, files[0] / "below", tokenizer, show=False)
