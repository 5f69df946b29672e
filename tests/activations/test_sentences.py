"""Sentence embeddings as a run's hidden states."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_matryoshka_sae.activations import DatasetConfig
from hf_matryoshka_sae.activations.sentences import load_sentence_transformer, sentence_embeddings
from hf_matryoshka_sae.assets import embedded_lm_path
from hf_matryoshka_sae.models import TopKSAE
from hf_matryoshka_sae.training import RunConfig, train


pytest.importorskip("sentence_transformers")

TEXTS = [f"Sentence number {i} is about {topic}." for i in range(20) for topic in ("rain", "music", "bread")]


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetConfig:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    return DatasetConfig(str(path))


def test_rows_are_what_the_library_pools_of_each_text_alone(dataset) -> None:
    rows = sentence_embeddings("embedded", dataset, most=10**6, show=False)
    # A causal language model without a pooling of its own: the last token's hidden state.
    model, tokenizer = (cls.from_pretrained(embedded_lm_path()) for cls in (AutoModel, AutoTokenizer))
    with torch.no_grad():
        expected = torch.cat([model(**tokenizer(t, return_tensors="pt")).last_hidden_state[:, -1] for t in TEXTS])
    assert rows.shape == expected.shape
    # The order is that of the seed.
    distances = torch.cdist(rows.double(), expected.double())
    assert distances.min(1).values.max() < 1e-4 and len(set(distances.argmin(1).tolist())) == len(TEXTS)


def test_at_most_so_many_texts_are_read_and_the_seed_says_which(dataset) -> None:
    model = load_sentence_transformer("embedded")
    first, again, other = (sentence_embeddings(model, dataset, 7, seed=seed, show=False) for seed in (0, 0, 1))
    assert len(first) == 7 and torch.equal(first, again) and not torch.equal(first, other)


def test_a_run_trains_on_them(dataset, tmp_path: Path) -> None:
    fields = {
        "model": "embedded",
        "dataset": {"path": dataset.path},
        "hookpoints": ["sentence_embedding"],
        "saes": [{"type": "topk", "num_latents": 64, "k": 4}],
        "tokens": 2048,
        "batch_size": 64,
        "output_dir": str(tmp_path / "run"),
    }
    (result,) = train(RunConfig.from_dict(fields))
    sae = TopKSAE.from_pretrained(tmp_path / "run")
    assert (sae.config.hookpoint, sae.config.base_model, sae.config.d_in) == ("sentence_embedding", "embedded", 128)
    assert result["saes"]["topk-64-k4"][0]["fvu"] < 0.9
    with pytest.raises(ValueError, match="must be a run's only hookpoint"):
        train(RunConfig.from_dict(fields | {"hookpoints": ["sentence_embedding", "model.layers.1"]}))


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        load_sentence_transformer(str(tmp_path / "nothing-here"))
