"""Absorption of properties of tokens in worlds where it is planted."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.common.token_text import token_texts
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig
from hf_matryoshka_sae.studies.concepts.first_letter import NotDefined
from hf_matryoshka_sae.studies.concepts.properties import property_absorption
from hf_matryoshka_sae.studies.probing.token_properties import WORD_CLASSES


CHILDREN, OTHERS, WINDOWS, LENGTH = 40, 60, 80, 100
HOOKPOINT = "model.embed_tokens"


@pytest.fixture(scope="module")
def words() -> tuple[list[int], list[int], object]:
    """Tokens that are function words, tokens that are others, and their tokenizer."""
    tokenizer = load_embedded_lm()[1]
    texts = token_texts(tokenizer, range(len(tokenizer)))
    lexicon = set(" ".join(WORD_CLASSES.values()).split())
    whole = {
        text[1:]: token
        for token, text in enumerate(texts)
        if text[:1] == " " and text[1:].isalpha() and text.islower()
    }
    function = [token for word, token in whole.items() if word in lexicon]
    others = [token for word, token in whole.items() if word not in lexicon and len(word) > 3]
    return function[:CHILDREN], others[:OTHERS], tokenizer


def world(words, absorbed: int, seed: int = 0) -> tuple[HeldOut, ReluSAE]:
    """Function words have a direction, each one its own as well; latents of some words carry both and absorb it."""
    function, others, tokenizer = words
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(CHILDREN + 8, CHILDREN + 8, generator=generator)).Q
    parent, own, rest = axes[0], axes[1 : CHILDREN + 1], axes[CHILDREN + 1 :]
    size = CHILDREN + 8
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    ).eval()
    rows = 0.3 * torch.randn(len(tokenizer), len(rest), generator=generator) @ rest
    rows[function] = 0.01 * torch.randn(CHILDREN, len(rest), generator=generator) @ rest + 2 * parent + own
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            rows + 3 * rest[0]
        )  # with a mean that is longer than the differences
    both = parent + own[:absorbed]
    encoder = torch.cat([parent[None] - 2 * own[:absorbed].sum(0), both])
    decoder = torch.cat([parent[None], both])
    sae = ReluSAE(
        ReluSAEConfig(d_in=size, num_latents=len(encoder), hookpoint=HOOKPOINT, apply_b_dec_to_input=False)
    ).eval()
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
        sae.b_dec.copy_(3 * rest[0])
        # A child's latent fires on the child alone: 3 on it, 2 on every other function word.
        sae.b_enc.copy_(torch.tensor([-1e-3] + [-2.5] * absorbed))
    draws = [function[at % CHILDREN] for at in range(4 * WINDOWS * LENGTH // 10)]
    draws += [others[at % OTHERS] for at in range(WINDOWS * LENGTH - len(draws))]
    ids = torch.tensor(draws)[torch.randperm(len(draws), generator=generator)].view(WINDOWS, LENGTH)
    batch = TokenBatch(ids, torch.ones_like(ids), torch.ones_like(ids).bool(), False)
    return HeldOut(model, [batch], HOOKPOINT, None, tokenizer), sae


@pytest.mark.parametrize("absorbed", [0, 4, 10])
def test_planted_absorption_of_a_property_is_found_at_its_rate(words, absorbed):
    data, sae = world(words, absorbed)
    found = property_absorption(data, sae, baselines=False, show=False)
    (row,) = found.records
    share = absorbed / CHILDREN
    assert row["full_absorption"] == pytest.approx(share, abs=0.02)
    assert row["absorption_fraction"] == pytest.approx(share, abs=0.02)
    assert row["hole_share"] == pytest.approx(share, abs=0.02)
    assert row["split_latents"] == 1 and row["num_letters"] == 1
    own = found.about["properties"]["sae"][len(sae.W_dec)]["function word"]
    assert own["children"] == CHILDREN and len(own["holes"]) == absorbed
    assert found.about["probe_f1"]["function word"] == 1 and "function word (F1 1.00)" in str(found)


def test_a_property_that_no_probe_finds_is_not_defined(words):
    data, sae = world(words, 0)
    with torch.no_grad():
        weight = data.model.get_input_embeddings().weight
        weight.copy_(torch.zeros_like(weight) + weight[0])
    with pytest.raises(NotDefined, match="finds no property with F1 above 0.8"):
        property_absorption(data, sae, show=False)
