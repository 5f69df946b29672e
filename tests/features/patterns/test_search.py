"""Against dense activations of all tokens at once."""

import pytest
import torch

from hf_matryoshka_sae.evaluation import HeldOut, open_heldout
from hf_matryoshka_sae.features.patterns.matching import TokenPattern
from hf_matryoshka_sae.features.patterns.search import search_latents, search_words, word_mask
from hf_matryoshka_sae.features.patterns.vocabulary import vocabulary_of
from hf_matryoshka_sae.models import MatryoshkaSAE, MatryoshkaSAEConfig


CAPITAL = r"[re `\s?[A-Z]\w*`]"


@pytest.fixture(scope="module")
def data() -> HeldOut:
    return open_data()


def open_data() -> HeldOut:
    return open_heldout(hookpoint="model.layers.1", tokens=1500, context_length=64, lm_batch_size=5)


def build():
    torch.manual_seed(1)
    config = MatryoshkaSAEConfig(d_in=128, num_latents=96, prefix_widths=[32, 96], k=6, activation="topk")
    sae = MatryoshkaSAE(config).eval()
    sae.W_enc.data *= 0.1
    return sae


def dense(sae, data, mask_of, width=None):
    """Cosine, precision and recall of every latent, from all activations in one matrix."""
    acts = torch.cat([sae.encode(data.states(batch), width=width).to_dense() for batch in data.batches]).double()
    mask = torch.cat([mask_of(batch)[batch.keep] for batch in data.batches]).double()
    fires = (acts > 0).double()
    cosine = torch.nn.functional.cosine_similarity(acts, mask[:, None], dim=0)
    return cosine, (fires.T @ mask) / fires.sum(0), (fires.T @ mask) / mask.sum(), int(mask.sum())


def check(hits, expected):
    cosine, precision, recall, matched = expected
    order = cosine.argsort(descending=True, stable=True)[: len(hits)]
    assert [hit.latent for hit in hits] == order.tolist()
    for hit in hits:
        assert hit.tokens_matched == matched
        assert hit.cosine == pytest.approx(cosine[hit.latent].item(), rel=1e-6)
        assert hit.precision == pytest.approx(precision[hit.latent].item())
        assert hit.recall == pytest.approx(recall[hit.latent].item())


@pytest.mark.parametrize("width", [None, 32])
def test_sums_are_those_of_dense_activations(data, width):
    sae = build()
    with torch.no_grad():
        expected = dense(
            sae, data, lambda batch: TokenPattern.compile(CAPITAL, data.tokenizer).mask(batch.input_ids), width
        )
    hits = search_latents(CAPITAL, sae, data, top=7, width=width, show=False)
    assert len(hits) == 7 and expected[-1] > 10
    check(hits, expected)


def test_words_in_any_case(data):
    sae = build()

    def mask(batch):
        vocabulary = vocabulary_of(data.tokenizer)
        return torch.stack([word_mask(["NAME", "private"], row.tolist(), vocabulary) for row in batch.input_ids])

    with torch.no_grad():
        expected = dense(sae, data, mask)
    check(search_words(["name", "Private"], sae, data, top=5, show=False), expected)


def test_a_word_is_all_of_its_tokens_and_only_whole_words(data):
    tokenizer = data.tokenizer
    text = "Hello helloo the hello. thé (the) bathe"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = word_mask(["hello", "thé"], ids, vocabulary_of(tokenizer))
    inside = [token for token, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.decode(inside) == "Hello hello thé"
    assert len(inside) > 3  # in this vocabulary they are several tokens each


def test_what_cannot_be_searched_is_said(data):
    sae = build()
    with pytest.raises(ValueError, match="None of the 1500 tokens .*leading space"):
        search_latents("[a=.][a][a][a][a][a][a][a][a][a][a][a][a][a][a] x", sae, data, show=False)
    with pytest.raises(ValueError, match="words xylophonist"):
        search_words("xylophonist", sae, data, show=False)
    with pytest.raises(ValueError, match="one or more words"):
        search_words([" "], sae, data, show=False)
    for words in ("", ["name", ""]):
        with pytest.raises(ValueError, match="an empty word is everywhere"):
            search_words(words, sae, data, show=False)
    with pytest.raises(ValueError, match="got an empty list"):
        search_words([], sae, data, show=False)
    for words in (3, None, [3], ["a", None]):
        with pytest.raises(ValueError, match="Expected a word, or a list of words"):
            search_words(words, sae, data, show=False)
    with pytest.raises(ValueError, match="`names` must be a dictionary"):
        search_latents("a", sae, data, show=False, names=3)
    with pytest.raises(ValueError, match="takes longer than 0.2 seconds"):
        search_latents("(.|..)+(.|..)+ the", sae, data, show=False, timeout=0.2)
    with pytest.raises(ValueError, match="`top`"):
        search_latents(CAPITAL, sae, data, top=0, show=False)
    nameless = HeldOut(data.model, data.batches, data.hookpoint)
    with pytest.raises(ValueError, match="tokenizer"):
        search_latents(CAPITAL, sae, nameless, show=False)
