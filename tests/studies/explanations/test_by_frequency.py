"""Scores do not depend on how often a latent fires where it is as easy to explain; lookup tables."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig
from hf_matryoshka_sae.studies.explanations.by_frequency import bin_of, by_frequency, matched
from hf_matryoshka_sae.studies.explanations.explainability import explainability
from hf_matryoshka_sae.studies.explanations.lookup import LookupTables, best_threshold, f1
from hf_matryoshka_sae.studies.explanations.n2g import Examples, evenly


FREQUENCIES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
EACH, WORDS, TOKENS = 48, 1000, 8_000


def planted_texts() -> tuple[ReluSAE, HeldOut, HeldOut]:
    """An SAE at an embedding: 48 latents of each frequency, each on words that are all equally frequent."""
    generator, size = np.random.default_rng(0), EACH * len(FREQUENCIES)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS + 100, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
        )
    ).eval()
    rows = torch.zeros(WORDS + 100, size)
    for latent in range(size):
        count = round(FREQUENCIES[latent // EACH] * WORDS)
        words = 100 + generator.permutation(WORDS)[:count]
        rows[words, latent] = torch.from_numpy(generator.lognormal(size=count)).float()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
    sae = ReluSAE(ReluSAEConfig(d_in=size, num_latents=size, hookpoint="model.embed_tokens")).eval()
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.eye(size))
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
    tokenizer = load_embedded_lm()[1]
    texts = []
    for _ in range(2):
        ids = torch.from_numpy(generator.integers(100, WORDS + 100, size=(TOKENS // 100, 100)))
        batch = TokenBatch(ids, torch.ones_like(ids), torch.ones_like(ids).bool(), False)
        texts.append(HeldOut(model, [batch], "model.embed_tokens", None, tokenizer))
    return sae, *texts


@pytest.mark.release
def test_equally_explainable_latents_score_the_same_at_every_frequency():
    sae, examples, test = planted_texts()
    found = explainability(
        {"planted": sae}, examples, test, per_group=10**6, baselines=False, least=1, least_test=1, show=False
    )
    rows = [row for row in found.about["by_frequency"] if row["latents"] >= 8]
    scores = np.array([one.f1 for one in found.latents["planted"]]).reshape(len(FREQUENCIES), EACH)
    assert scores.shape == (6, 48)
    assert np.ptp(scores.mean(1)) < 0.05 and scores.mean() > 0.95
    for key in ("token_f1", "pair_f1"):
        table = np.array([getattr(one, key) for one in found.latents["planted"]]).reshape(len(FREQUENCIES), EACH)
        assert np.ptp(table.mean(1)) < 0.05 and table.mean() > 0.95
    assert all(row["f1_interval"] is not None for row in rows) and "By frequency:" in str(found)


def text_of(windows: list[list[int]], values: list[list[float]]) -> Examples:
    flat = torch.tensor(values).flatten()
    places = flat.nonzero().flatten()
    ids = torch.tensor(windows)
    return Examples(ids, torch.ones_like(ids).bool(), {0: (places, flat[places])})


def test_a_table_of_pairs_tells_what_a_table_of_tokens_cannot():
    generator = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        windows = generator.integers(0, 5, size=(40, 50))
        pair = (windows[:, :-1] == 1) & (windows[:, 1:] == 2)
        parts.append(text_of(windows.tolist(), np.pad(pair, ((0, 0), (1, 0))).astype(float).tolist()))
    scores = LookupTables(*parts).score(0)
    assert scores["pair_f1"] == 1 and scores["pair_correlation"] > 0.99
    # Of the token alone: fires on one in five 2s, so that saying it of every 2 has a precision of a fifth.
    assert scores["token_f1"] == pytest.approx(2 * 0.2 / 1.2, abs=0.06)


def test_tokens_seen_once_do_not_vouch_for_themselves():
    generator = np.random.default_rng(1)
    fires = [[float(value) for value in row] for row in generator.integers(0, 2, size=(20, 50))]
    different = np.arange(1000).reshape(20, 50)
    scores = LookupTables(text_of(different.tolist(), fires), text_of((different + 1000).tolist(), fires)).score(0)
    assert scores["token_correlation"] == 0  # nothing of it was seen: a constant


def test_the_threshold_is_that_of_the_best_f1():
    generator = np.random.default_rng(2)
    scores, truth = generator.integers(0, 9, size=200) / 9, generator.random(200) < 0.3
    best = max(f1(scores >= value, truth) for value in np.unique(scores))
    assert f1(scores >= best_threshold(scores, truth), truth) == best
    assert best_threshold(scores, np.zeros(200, dtype=bool)) == np.inf


def test_examples_are_spread_over_the_ranks_of_activations():
    values = np.random.default_rng(0).permutation(1000).astype(float)
    chosen = values[evenly(values, 10, np.random.default_rng(0))]
    assert chosen[0] == 999 and [int(999 - value) // 100 for value in chosen] == list(range(10))
    assert sorted(evenly(values, 2000, np.random.default_rng(0))) == list(range(1000))


@dataclass
class One:
    latent: int
    frequency: float
    f1: float
    weight: float = 1.0


def test_saes_compared_at_equal_frequency_differ_by_what_frequency_does_not_explain():
    # The score falls with frequency in both; one SAE is full of frequent latents, and .1 better at each frequency.
    def latents(shares: tuple[int, ...], more: float) -> list[One]:
        return [
            One(n, frequency, level + more)
            for n, (frequency, level) in enumerate(
                pair
                for pair, count in zip([(0.2, 0.2), (0.05, 0.5), (0.002, 0.8)], shares, strict=True)
                for pair in [pair] * count
            )
        ]

    own = {"often": latents((40, 20, 0), 0.1), "seldom": latents((10, 20, 30), 0.0)}
    rows = {row["subject"]: row for row in matched(own, ["f1"], [60])}
    assert rows["often"]["f1"] - rows["seldom"]["f1"] == pytest.approx(0.1)
    assert rows["seldom"]["covered"] == pytest.approx(0.5) and rows["often"]["covered"] == 1
    raw = {name: np.mean([one.f1 for one in each]) for name, each in own.items()}
    assert raw["often"] < raw["seldom"]
    table = by_frequency({"few": own["often"][:7]}, ["f1"])
    assert table[0]["f1_interval"] is None and table[0]["frequency"] == "0.1 to 0.3"


def test_bins_are_half_decades():
    assert bin_of(np.array([0.5, 0.2, 0.05, 0.002])).tolist() == [0, -1, -2, -5]
