"""Patterns of tokens: the trie against plain matching, the steps against runs of the model, planted latents."""

import copy

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, BertConfig, BertModel

from hf_matryoshka_sae.activations import harvest
from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.evaluation import HeldOut, open_heldout
from hf_matryoshka_sae.models import TopKSAEConfig, build_sae
from hf_matryoshka_sae.studies.drawn_latents import neuron_dictionary
from hf_matryoshka_sae.studies.explanations.explainability import explainability
from hf_matryoshka_sae.studies.explanations.n2g import Explainer, firing_examples, score
from hf_matryoshka_sae.studies.explanations.n2g_runs import latent_values
from hf_matryoshka_sae.studies.explanations.n2g_trie import HERE, START, WILDCARD, PatternTrie

from ...evaluation.planted import frequent, planted


def matches(pattern: list[int], window: list[int], end: int) -> bool:
    """Whether a pattern ends on a token: said token by token."""
    start = end - (len(pattern) - (pattern[0] == START)) + 1
    if start < 0 or (pattern[0] == START and start != 0):
        return False
    keys = pattern[1:] if pattern[0] == START else pattern
    return all(key in (WILDCARD, window[start + place]) for place, key in enumerate(keys))


@pytest.mark.parametrize("seed", range(20))
def test_a_trie_matches_what_its_patterns_say(seed):
    generator = np.random.default_rng(seed)
    windows = generator.integers(0, 3, size=(6, 9))
    patterns = []
    for _ in range(generator.integers(1, 12)):
        keys = generator.choice([0, 1, 2, WILDCARD], size=generator.integers(1, 5)).tolist()
        keys[-1] = int(generator.integers(0, 3))
        patterns.append([START] * bool(generator.integers(0, 2)) + keys)
    values = generator.uniform(1, 5, size=len(patterns))
    trie = PatternTrie()
    for pattern, value in zip(patterns, values, strict=True):
        trie.add(pattern, value)
    found = trie.predict(windows)
    for row, window in enumerate(windows.tolist()):
        for end in range(len(window)):
            ends = [pattern for pattern in patterns if matches(pattern, window, end)]
            assert (found[row, end] > 0) == bool(ends)
            if ends:
                longest = max(len(pattern) for pattern in ends)
                seen = [v for p, v in zip(patterns, values, strict=True) if p in ends and len(p) == longest]
                assert min(seen) - 1e-9 <= found[row, end] <= max(seen) + 1e-9


def test_a_branch_that_leads_nowhere_does_not_hide_the_wildcard_beside_it():
    trie = PatternTrie()
    trie.add([7, 1, 5], 2.0)
    trie.add([8, WILDCARD, 5], 3.0)
    assert trie.predict(np.array([[8, 1, 5]])).tolist() == [[0, 0, 3.0]]


def test_a_pattern_seen_twice_predicts_the_mean():
    trie = PatternTrie()
    trie.add([1, 2], 1.0)
    trie.add([1, 2], 3.0)
    assert trie.patterns == 1 and trie.predict(np.array([[1, 2]]))[0, 1] == 2.0


def test_a_trie_lists_what_was_added():
    trie = PatternTrie()
    patterns = {(1, 2): [1.0, 2.0], (2,): [4.0], (START, WILDCARD, 2): [3.0], (3,): [0.5]}
    for pattern, values in patterns.items():
        for value in values:
            trie.add(pattern, value)
    assert trie.items() == [([2], 4.0), ([START, WILDCARD, 2], 3.0), ([1, 2], 1.5), ([3], 0.5)]


@pytest.mark.parametrize("pattern", [[], [START], [1, START, 2]])
def test_a_pattern_is_tokens(pattern):
    with pytest.raises(ValueError, match="A pattern is tokens"):
        PatternTrie().add(pattern, 1.0)


def test_a_planted_token_is_found_with_an_f1_of_one(text):
    examples, test = text
    tokens = frequent(examples, 4)
    sae = planted(examples, tokens)
    explainer = Explainer(sae, examples, substitutes=0)
    seen, unseen = (firing_examples(sae, data, range(4), show=False) for data in (examples, test))
    for latent in range(4):
        trie = explainer.explain(latent, seen)
        assert trie.patterns == 1
        found = score(latent, trie, unseen)
        assert (found.precision, found.recall, found.f1) == (1.0, 1.0, 1.0) and found.correlation > 0.999


def test_examples_are_where_latents_fire(text):
    examples, _ = text
    tokens = frequent(examples, 3)
    found = firing_examples(planted(examples, tokens), examples, [0, 2], show=False)
    for latent in (0, 2):
        assert torch.equal(found.dense(latent) > 0, (found.windows == tokens[latent]) & found.keep)


def test_activations_of_runs_are_those_of_the_model_alone(trained):
    sae, data, _ = trained
    explainer = Explainer(sae, data)
    ids = data.batches[0].input_ids[0, 1:20].tolist()
    runs = [ids[:3], ids[2:9], ids[5:6]]
    found = explainer.reader.activations(2, [(tuple(run), 0) for run in runs])
    for run, value in zip(runs, found, strict=True):
        alone = torch.tensor([[*explainer.reader.prefix, *run]])
        states = harvest(data.model, alone, None, ["model.layers.2"])["model.layers.2"][0, -1:]
        dense = sae.encode(states).to_dense()[0].detach()
        assert value == pytest.approx(float(dense[2]), abs=1e-4)
        assert float(latent_values(sae, states, 2)) == pytest.approx(float(dense[2]), abs=1e-5)


@pytest.mark.release
def test_a_trained_sae_is_explained_better_than_random_directions_and_neurons():
    demo = AutoModel.from_pretrained(embedded_sae_path()).eval()
    text = {"path": "embedded", "split": "train"}
    examples = open_heldout("embedded", "model.layers.2", text, tokens=20_000)
    test = open_heldout("embedded", "model.layers.2", tokens=8_000)
    found = explainability({"demo": demo}, examples, test, [2048], per_group=48, substitutes=1, show=False)
    scores = {(row["subject"], row["bin"]): row["f1"] for row in found.about["by_frequency"]}
    for other in ("random (demo)", "neurons"):  # at equal frequency, on which a score depends
        bins = [number for name, number in scores if name == other and ("demo", number) in scores]
        ours, theirs = (sum(scores[name, number] for number in bins) for name in ("demo", other))
        assert len(bins) > 1 and ours > 1.5 * theirs
    for rows in found.subjects().values():
        for row in rows:
            assert row["f1_interval"][0] <= row["f1"] <= row["f1_interval"][1]
    assert "neurons" in str(found) and found.to_dict()["example_tokens"] == 20_000


def test_neurons_are_dimensions(text):
    examples, _ = text
    sae = neuron_dictionary(examples, k=5)
    x = next(iter(examples.activations()))[:50]
    dense = sae.encode(x).to_dense()
    mean = torch.cat(list(examples.activations())).mean(0)
    largest = (x - mean).abs().topk(5).indices
    fires = (dense[:, :128] + dense[:, 128:]) > 0
    assert all(
        set(row.nonzero().flatten().tolist()) == set(top.tolist()) for row, top in zip(fires, largest, strict=True)
    )


def test_what_cannot_be_explained_is_said(text):
    examples, test = text
    sae = planted(examples, frequent(examples, 2))
    with pytest.raises(ValueError, match="at least one SAE"):
        explainability({}, examples, test)
    with pytest.raises(ValueError, match="fires on at least 1000000"):
        explainability({"a": sae}, examples, test, least=10**6, baselines=False, show=False)
    with pytest.raises(ValueError, match="no examples of latent 1"):
        Explainer(sae, examples).explain(1, firing_examples(sae, examples, [0], show=False))
    with pytest.raises(ValueError, match="`effort` > 0"):
        Explainer(sae, examples, effort=0)


def test_a_pattern_may_reach_behind_the_token_it_tells_of():
    trie = PatternTrie()
    trie.add([1, 5, HERE, 2], 3.0)
    trie.add([START, 5, HERE, WILDCARD, 4], 2.0)
    windows = np.array([[1, 5, 2, 1, 5, 3], [5, 7, 4, 1, 5, 2]])
    assert trie.predict(windows).tolist() == [[0, 3.0, 0, 0, 0, 0], [2.0, 0, 0, 0, 3.0, 0]]
    for wrong in ([HERE, 1], [1, HERE], [1, HERE, 2, HERE, 3], [START, HERE, 1]):
        with pytest.raises(ValueError, match="A pattern is tokens"):
            trie.add(wrong, 1.0)


@pytest.fixture(scope="module")
def encoder(text):
    """A small encoder with the embedded tokenizer's words, and an SAE of its states."""
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(text[0].tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=len(tokenizer), initializer_range=0.3)).eval()
    config = TopKSAEConfig(d_in=32, num_latents=64, k=4, hookpoint="encoder.layer.1")
    batches = text[0].batches[:2]
    return build_sae(config).eval(), HeldOut(model, batches, "encoder.layer.1", None, tokenizer)


def test_an_encoders_latents_do_not_depend_on_what_they_are_batched_with(encoder):
    sae, data = encoder
    explainer = Explainer(sae, data)
    assert explainer.reader.sees_ahead and (explainer.reader.prefix, explainer.reader.suffix) == ([1], [2])
    ids = data.batches[0].input_ids[0].tolist()
    runs = [(tuple(ids[3:4]), 0), (tuple(ids[5:9]), 1), (tuple(ids[2:30]), 10)]
    for latent in range(64):
        together = explainer.reader.activations(latent, runs)
        for run, value in zip(runs, together, strict=True):
            # By hand: the whole text with its special tokens, alone.
            whole = torch.tensor([[1, *run[0], 2]])
            with torch.no_grad():
                states = data.model(whole, output_hidden_states=True).hidden_states[2][:, len(run[0]) - run[1]]
            dense = sae.encode(states).to_dense()[0, latent]
            assert value == pytest.approx(float(dense), abs=1e-5)


def test_a_causal_model_does_not_see_ahead(trained):
    assert not Explainer(*trained[:2]).reader.sees_ahead


def test_an_encoders_patterns_have_what_follows(encoder):
    sae, data = encoder
    found = firing_examples(sae, data, range(8), show=False)
    latent = max(range(8), key=lambda one: len(found.fired[one][0]))
    patterns = [pattern for pattern, _ in list(Explainer(sae, data, effort=0.05).explain(latent, found).items())]
    assert any(HERE in pattern for pattern in patterns)
