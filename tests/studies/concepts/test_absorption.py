"""Absorption against a direct computation, and in worlds where it is planted."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_matryoshka_sae.activations import load_language_model
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, build_sae
from hf_matryoshka_sae.models.sparse_ops import LatentPairs, PairIndex
from hf_matryoshka_sae.studies.concepts.absorption import (
    AbsorptionThresholds,
    _unit_latents,
    absorbed_words,
    absorption,
    absorption_on_task,
)
from hf_matryoshka_sae.studies.concepts.first_letter import LETTERS, FirstLetterTask


NUM_LETTERS, WORDS, ATTRIBUTES = 5, 100, 5
PLANTED = 0.1
WORLD = AbsorptionThresholds(min_letters=NUM_LETTERS)


def pairs(dense: torch.Tensor) -> LatentPairs:
    rows, cols = dense.nonzero(as_tuple=True)
    return LatentPairs(PairIndex(rows, cols, *dense.shape), dense[rows, cols])


def by_definition(x, a, decoder, p, main) -> tuple[bool, float]:
    """One word, as the definition reads (float64, dense)."""
    p = p / p.norm()
    cos = decoder @ p
    along = a * cos
    total = float(x @ p)
    others = [i for i in range(len(a)) if i not in main]

    full = False
    if all(abs(float(a[i])) < 1e-8 for i in main) and total > 0:
        top = int(along.argmax())
        full = float(cos[top]) >= 0.025 and float(along[top]) / total >= 0.4

    of_main = sum(float(along[i]) for i in main)
    absorbing = sum(sorted((float(along[i]) for i in others if cos[i] >= 0.1 and along[i] > 0), reverse=True)[:3])
    if total <= 0 or of_main >= total or absorbing / total < 0.4:
        return full, 0.0
    if of_main <= 0:
        return full, 1.0
    taken = min(absorbing, total - of_main)
    return full, taken / (taken + of_main)


def test_scores_are_those_of_the_definition():
    decoder = torch.randn(40, 6, dtype=torch.float64)
    decoder = decoder / decoder.norm(dim=1, keepdim=True)
    latents = torch.rand(600, 40, dtype=torch.float64) * (torch.rand(600, 40) < 0.12)
    states = latents @ decoder + 0.3 * torch.randn(600, 6, dtype=torch.float64)
    p, main = torch.randn(6, dtype=torch.float64), torch.tensor([3, 17, 30])
    full, fraction = absorbed_words(states, pairs(latents), decoder, 5 * p, main)
    expected = [by_definition(x, a, decoder, p, main.tolist()) for x, a in zip(states, latents, strict=True)]
    assert full.tolist() == [word[0] for word in expected]
    torch.testing.assert_close(fraction, torch.tensor([word[1] for word in expected], dtype=torch.float64))
    assert 0 < full.sum() < 600 and ((fraction > 0) & (fraction < 1)).any() and (fraction == 1).any()


def test_a_latent_nearly_orthogonal_to_the_probe_does_not_absorb_fully():
    cosine = torch.tensor([0.02, 0.03])
    decoder = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=1)
    latents = 100 * torch.eye(2)  # 2 and 3 along the probe
    full, _ = absorbed_words(
        latents @ decoder, pairs(latents), decoder, torch.tensor([1.0, 0]), torch.tensor([], dtype=int)
    )
    assert full.tolist() == [False, True]


def test_words_without_latents_are_not_absorbed():
    full, fraction = absorbed_words(
        torch.ones(2, 3), pairs(torch.zeros(2, 3)), torch.eye(3), torch.ones(3), torch.tensor([0])
    )
    assert full.tolist() == [False, False] and fraction.tolist() == [0, 0]


def test_decoder_rows_must_have_unit_length():
    latents = pairs(torch.ones(2, 3))
    with pytest.raises(ValueError, match="length 1"):
        absorbed_words(torch.ones(2, 3), latents, 2 * torch.eye(3), torch.ones(3), torch.tensor([0]))
    with pytest.raises(ValueError, match="Expected latents of 4 words"):
        absorbed_words(torch.ones(4, 3), latents, torch.eye(3), torch.ones(3), torch.tensor([0]))


# A world of words: each has a letter, and one in ten of each letter's has one of five attributes, too rare for a
# latent of its own to raise F1.


def world() -> tuple[FirstLetterTask, torch.Tensor, torch.Tensor]:
    """The task, directions of letters and directions of attributes."""
    axes = torch.linalg.qr(torch.randn(16, 16)).Q
    letters, attributes = axes[:NUM_LETTERS], axes[NUM_LETTERS : NUM_LETTERS + ATTRIBUTES]
    word = torch.arange(WORDS).repeat(NUM_LETTERS)
    letter = torch.arange(NUM_LETTERS).repeat_interleave(WORDS)
    states = letters[letter] + 0.01 * torch.randn(len(word), 6) @ axes[NUM_LETTERS + ATTRIBUTES :]
    has = word < 2 * ATTRIBUTES
    states[has] += attributes[word[has] // 2]
    names = [f"{LETTERS[i]}{j}" for i, j in zip(letter.tolist(), word.tolist(), strict=True)]
    return FirstLetterTask(states, letter, names, word % 2 == 0, {"hookpoint": "world"}), letters, attributes


def dictionary(letters: torch.Tensor, attributes: torch.Tensor, absorbing: bool, lengths: float = 1.0, **options):
    """First a latent per letter; then a latent per attribute, or one per letter and attribute that absorbs."""
    if absorbing:
        both = (letters[:, None] + attributes).flatten(0, 1)
        encoder = torch.cat([letters - attributes.sum(0), both])
        decoder = torch.cat([letters, both])
        bias = torch.cat([torch.zeros(len(letters)), -torch.ones(len(both))])
    else:
        encoder = decoder = torch.cat([letters, attributes])
        bias = torch.zeros(len(encoder))
    widths = [len(letters), len(encoder)]
    config = MatryoshkaSAEConfig(
        d_in=16, num_latents=widths[-1], prefix_widths=widths, activation="relu", apply_b_dec_to_input=False, **options
    )
    sae = build_sae(config).eval()
    with torch.no_grad():
        sae.W_enc.copy_(encoder / lengths)
        sae.b_enc.copy_(bias / lengths - 1e-3)  # rounding fires nothing
        sae.W_dec.copy_(decoder * lengths)
        sae.b_dec.zero_()
    return sae


@pytest.mark.parametrize("lengths", [1.0, 7.0])
def test_planted_absorption_is_found_at_its_rate(lengths):
    task, letters, attributes = world()
    result = absorption_on_task(dictionary(letters, attributes, True, lengths), task, thresholds=WORLD)
    assert result["defined"] and result["heldout_words"] == NUM_LETTERS * WORDS // 2
    assert all(f1 == 1 for f1 in result["probe_f1"].values())
    narrow, wide = result["rows"]
    assert wide["full_absorption"] == pytest.approx(PLANTED)
    assert wide["absorption_fraction"] == pytest.approx(PLANTED)
    assert wide["split_latents"] == 1 and wide["words"] == NUM_LETTERS * WORDS // 2
    assert [of["main_latents"] for of in wide["letters"].values()] == [[c] for c in range(NUM_LETTERS)]
    # The first latents alone leave holes, but nothing carries the letter there.
    assert narrow["width"] == NUM_LETTERS and narrow["full_absorption"] == narrow["absorption_fraction"] == 0
    assert narrow["l0"] == pytest.approx(1 - PLANTED) and wide["l0"] == pytest.approx(1)
    json.dumps(result)


def test_a_clean_dictionary_absorbs_nothing():
    task, letters, attributes = world()
    for row in absorption_on_task(dictionary(letters, attributes, False), task, thresholds=WORLD)["rows"]:
        assert row["full_absorption"] == row["absorption_fraction"] == 0
        assert row["split_latents"] == 1 and row["num_letters"] == NUM_LETTERS


@pytest.mark.parametrize("options", [{}, {"scale_by_decoder_norm": True}])
def test_unit_latents_decode_to_the_same_reconstruction(options):
    task, letters, attributes = world()
    sae = dictionary(letters, attributes, True, 7.0, **options)
    latents, decoder = _unit_latents(sae, task.states, 12, "restrict")
    dense = torch.zeros(latents.num_rows, latents.num_latents).index_put((latents.rows, latents.cols), latents.values)
    torch.testing.assert_close(dense @ decoder, sae.decode(sae.encode(task.states, 12)).detach())
    torch.testing.assert_close(decoder.norm(dim=1), torch.ones(len(decoder)))


def test_width_without_latents_for_enough_letters_has_no_means():
    task, letters, attributes = world()
    sae = dictionary(letters, attributes, False)
    row, full = absorption_on_task(sae, task, [2, 10], thresholds=WORLD)["rows"]
    assert row["full_absorption"] is row["absorption_fraction"] is row["split_latents"] is None
    assert "Only 2 letters" in row["reason"] and row["letters_without_latent"] == ["c", "d", "e"]
    assert full["reason"] is None


def test_states_that_do_not_spell_give_words_and_no_number():
    task, letters, attributes = world()
    blind = dataclasses.replace(task, states=torch.randn_like(task.states))
    sae = dictionary(letters, attributes, False)
    result = absorption_on_task(sae, blind, thresholds=WORLD)
    assert not result["defined"] and result["rows"] == []
    assert "F1 > 0.6 for" in result["reason"] and "world" in result["reason"]
    few = absorption_on_task(sae, task)
    assert not few["defined"] and "only 5 letters begin enough" in few["reason"]


def test_bad_input_is_named():
    task, letters, attributes = world()
    sae = dictionary(letters, attributes, False)
    with pytest.raises(ValueError, match="d_in = 16"):
        absorption_on_task(sae, dataclasses.replace(task, states=task.states[:, :8]), thresholds=WORLD)
    with pytest.raises(ValueError, match="`widths` must strictly increase"):
        absorption_on_task(sae, task, [], thresholds=WORLD)
    with pytest.raises(ValueError, match="at most 10"):
        absorption_on_task(sae, task, [11], thresholds=WORLD)


def test_training_mode_is_left_as_it_was():
    task, letters, attributes = world()
    sae = dictionary(letters, attributes, False).train()
    absorption_on_task(sae, task, thresholds=WORLD)
    assert sae.training


def test_the_embedded_language_model_is_too_small_and_the_result_says_so():
    model, tokenizer = load_language_model("embedded")
    sae = build_sae(MatryoshkaSAEConfig(d_in=128, num_latents=64, prefix_widths=[16, 64], k=4, activation="topk"))
    result = absorption(sae, model, tokenizer, "model.layers.1", shots=0, max_words=400)
    assert not result["defined"] and result["rows"] == [] and "not defined" in result["reason"]
    assert result["source"]["hookpoint"] == "model.layers.1" and result["heldout_words"] > 50


def test_an_sae_of_another_model_is_named_before_any_word_is_read():
    model, tokenizer = load_language_model("embedded")
    sae = build_sae(MatryoshkaSAEConfig(d_in=16, num_latents=8, prefix_widths=[4, 8], k=2, activation="topk"))
    with pytest.raises(ValueError, match="d_in = 16, those at model.layers.1 have 128"):
        absorption(sae, model, tokenizer, "model.layers.1")


def test_an_encoder_whose_tokenizer_has_no_words_says_so():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=3)).eval()
    sae = build_sae(MatryoshkaSAEConfig(d_in=16, num_latents=8, prefix_widths=[4, 8], k=2, activation="topk"))
    result = absorption(sae, model, tokenizer, "encoder.layer.0")
    assert not result["defined"] and "no token that is a word" in result["reason"]
    json.dumps(result)
