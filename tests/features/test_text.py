"""Against the language model's own hidden states, encoded by hand."""

import logging

import pytest
import torch

from hf_matryoshka_sae.activations import load_language_model
from hf_matryoshka_sae.features.text import text_features
from hf_matryoshka_sae.models import MatryoshkaSAE, MatryoshkaSAEConfig


HOOKPOINT = "model.layers.1"
TEXT = "def greet(name):\n    return '<b>' + name  # ☃ wörld"


@pytest.fixture(scope="module")
def lm():
    return load_language_model("embedded")


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    torch.manual_seed(1)
    config = MatryoshkaSAEConfig(
        d_in=128, num_latents=96, prefix_widths=[32, 96], k=6, activation="topk", hookpoint=HOOKPOINT
    )
    return MatryoshkaSAE(config).eval()


def by_hand(lm, sae, width):
    """Token ids with the BOS token first, and dense activations of all but that."""
    model, tokenizer = lm
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[2][0]
        acts = sae.encode(states, width=width).to_dense()
    acts[0] = 0
    return ids[0], acts


@pytest.mark.parametrize("width", [None, 32])
def test_activations_are_those_of_the_hidden_states(lm, sae, width):
    ids, acts = by_hand(lm, sae, width)
    found = text_features(sae, *lm, TEXT, width=width, top=3)
    assert torch.equal(found.token_ids, ids) and found.left_out == 0
    assert found.width == (width or 96)
    for latent in range(found.width):
        torch.testing.assert_close(found.activations(latent), acts[:, latent])
    values, latents = acts.topk(3, dim=1)
    for row, expected, names in zip(found.top, values.tolist(), latents.tolist(), strict=True):
        assert [latent for latent, _ in row] == [n for n, v in zip(names, expected, strict=True) if v > 0]
        assert [value for _, value in row] == pytest.approx([v for v in expected if v > 0], rel=1e-5)
    strongest = acts.amax(0)
    assert [latent for latent, _ in found.top_latents(4)] == strongest.argsort(descending=True)[:4].tolist()
    assert found.top_latents(1, by="sum")[0][1] == pytest.approx(float(acts.sum(0).max()), rel=1e-5)


def test_tokens_are_the_text_itself(lm, sae):
    found = text_features(sae, *lm, TEXT)
    plain = "".join(found.tokens[1:])
    assert plain.startswith("def greet(name):\n    return '<b>' + name  # ")
    assert not found.read[0] and found.read[1:].all() and found.top[0] == []


def test_a_long_text_is_cut_and_says_so(lm, sae, caplog):
    with caplog.at_level(logging.WARNING):
        found = text_features(sae, *lm, "name " * 30, hookpoint=HOOKPOINT, max_tokens=11)
    assert len(found.tokens) == 11
    whole = text_features(sae, *lm, "name " * 30)
    assert found.left_out == len(whole.tokens) - 11 and "left out" in caplog.text
    # What the model can read is a limit too; it reads 256 tokens.
    assert len(text_features(sae, *lm, "name " * 400).tokens) == 256


def test_what_cannot_be_read_is_said(lm, sae):
    for text in ("", " \n "):
        with pytest.raises(ValueError, match="empty"):
            text_features(sae, *lm, text)
    bos = lm[1].bos_token
    for text in (bos, bos * 3):
        with pytest.raises(ValueError, match="special tokens alone"):
            text_features(sae, *lm, text)
    for text in (None, 3, ["a"]):
        with pytest.raises(ValueError, match="Expected a text, got"):
            text_features(sae, *lm, text)
    for latent in (1.5, "1", True, None):
        with pytest.raises(ValueError, match="numbered 0 to 95"):
            text_features(sae, *lm, TEXT).activations(latent)
    with pytest.raises(ValueError, match="No module matches"):
        text_features(sae, *lm, TEXT, hookpoint="model.layer.1")
    with pytest.raises(ValueError, match="0 to 95, got 96"):
        text_features(sae, *lm, TEXT).activations(96)
    with pytest.raises(ValueError, match="'max' or 'sum'"):
        text_features(sae, *lm, TEXT).top_latents(by="mean")
    with pytest.raises(ValueError, match="`top`"):
        text_features(sae, *lm, TEXT, top=0)
    with pytest.raises(ValueError, match="hookpoint"):
        nameless = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=128, num_latents=96, prefix_widths=[32, 96], k=6))
        text_features(nameless, *lm, TEXT)
