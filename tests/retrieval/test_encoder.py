"""A sentence-transformers model with an SAE behind it: widths, saving, loading without this package, decoding."""

import json
import math
from pathlib import Path

import pytest
import torch


pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer, SparseEncoder

from hf_matryoshka_sae.assets import embedded_lm_path
from hf_matryoshka_sae.models import BatchTopKSAEConfig, SAEModel, TopKSAEConfig, build_sae
from hf_matryoshka_sae.retrieval import LatentEncoder, SparseEmbedding, sparse_encoder


TEXTS = ["Return the number of items.", "A violin concert", "Rivers flood the valley after days of rain."]
F = 96


def an_sae(config=TopKSAEConfig, **fields) -> SAEModel:
    torch.manual_seed(0)
    return build_sae(config(d_in=128, num_latents=F, k=8, hookpoint="sentence_embedding", **fields)).eval()


@pytest.fixture(scope="module")
def dense() -> SentenceTransformer:
    return SentenceTransformer(str(embedded_lm_path()), device="cpu")


@pytest.fixture(scope="module")
def encoder(dense) -> LatentEncoder:
    return sparse_encoder(dense, an_sae())


@pytest.fixture
def codes(encoder) -> torch.Tensor:
    return encoder.encode(TEXTS).to_dense()


@torch.no_grad()
def test_codes_are_those_of_the_sae(dense, encoder, codes) -> None:
    expected = encoder.latents.sae.encode(dense.encode(TEXTS, convert_to_tensor=True)).to_dense()
    torch.testing.assert_close(codes, expected, rtol=1e-5, atol=1e-6)
    assert ((codes > 0).sum(1) <= 8).all() and codes.shape == (3, F)


@pytest.mark.parametrize("config", [TopKSAEConfig, BatchTopKSAEConfig])
def test_a_width_is_a_slice_of_the_code(dense, config) -> None:
    sae = an_sae(config)
    whole = sparse_encoder(dense, sae).encode(TEXTS).to_dense()
    narrow = sparse_encoder(dense, sae, width=40)
    assert torch.equal(narrow.encode(TEXTS).to_dense(), whole[:, :40])
    assert narrow.get_embedding_dimension() == 40
    encoder = sparse_encoder(dense, sae)
    for encode in (encoder.encode_document, encoder.encode_query):
        asked, every = encode(TEXTS, width=40).to_dense(), encode(TEXTS).to_dense()
        assert torch.equal(asked[:, :40], every[:, :40]) and not asked[:, 40:].any() and asked.shape == every.shape


def test_the_largest_latents_stay(encoder, codes) -> None:
    kept = encoder.encode_document(TEXTS, max_active_dims=3).to_dense()
    for row, code in zip(kept, codes, strict=True):
        assert sorted(row[row > 0].tolist()) == sorted(code.topk(3).values[code.topk(3).values > 0].tolist())


def test_one_text_is_encoded_as_in_a_batch(encoder, codes) -> None:
    for text, row in zip(TEXTS, codes, strict=True):
        torch.testing.assert_close(encoder.encode(text).to_dense(), row, rtol=1e-4, atol=1e-5)


def test_tokens_are_pooled_by_the_maximum_of_their_logarithms(dense) -> None:
    sae = an_sae()
    pooled = sparse_encoder(dense, sae, pooling="max", width=50).encode(TEXTS).to_dense()
    for text, row in zip(TEXTS, pooled, strict=True):
        tokens = dense.encode(text, output_value="token_embeddings").double()
        pre = ((tokens - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()).tolist()
        expected = [0.0] * F
        for values in pre:
            for latent in sorted(range(F), key=lambda i: -values[i])[:8]:
                expected[latent] = max(expected[latent], math.log1p(max(values[latent], 0.0)))
        torch.testing.assert_close(row, torch.tensor(expected[:50]), rtol=1e-4, atol=1e-5)


def test_it_opens_with_and_without_this_package_and_is_saved_again(encoder, codes, tmp_path: Path) -> None:
    encoder.latents.names = {"5": {"words": ["rivers"], "texts": ["Rivers"], "share": 0.5}}
    encoder.save_pretrained(str(tmp_path / "first"))
    encoder.latents.names = {}
    ours = LatentEncoder(str(tmp_path / "first"))
    assert isinstance(ours.latents, SparseEmbedding) and ours.name_of(5) == "rivers"
    assert torch.equal(ours.encode(TEXTS).to_dense(), codes)
    ours.save_pretrained(str(tmp_path / "second"))
    for name in ("second", "third"):
        plain = SparseEncoder(str(tmp_path / name), trust_remote_code=True)
        # Its class comes from the folder's own files.
        assert type(plain[-1]).__module__.startswith("transformers_modules.")
        assert type(plain[-1].sae).__module__.startswith("transformers_modules.")
        assert torch.equal(plain.encode(TEXTS).to_dense(), codes)
        plain.save_pretrained(str(tmp_path / "third"))
    for path in (tmp_path / "third").glob("*.py"):
        assert "import hf_matryoshka_sae" not in path.read_text() and "from hf_matryoshka_sae" not in path.read_text()
    assert (
        json.loads((tmp_path / "third/2_SparseEmbedding/sparse_embedding.json").read_text())["pooling"] == "embedding"
    )


def test_decoding_names_the_latents(encoder, codes) -> None:
    pairs = encoder.decode(codes)
    assert [len(row) for row in pairs] == (codes > 0).sum(1).tolist()
    name, value = encoder.decode(codes.to_sparse()[0], top_k=1)[0]
    assert name == f"latent {int(codes[0].argmax())}" and value == pytest.approx(float(codes[0].max()))
    with pytest.raises(ValueError, match=r"must be \(N, 96\)"):
        encoder.decode(torch.zeros(2, 5))


def test_a_query_is_its_products_with_the_decoder(dense, encoder, codes) -> None:
    sae = encoder.latents.sae
    rows = dense.encode(TEXTS, convert_to_tensor=True).double() - sae.b_dec.double()
    queries = encoder.encode_query(TEXTS).to_dense()
    torch.testing.assert_close(queries, (rows @ sae.W_dec.double().T).float().detach(), rtol=1e-4, atol=1e-5)
    # Its product with a document's code is that of the embedding with what the code stands for.
    expected = rows.float() @ (codes @ sae.W_dec).T
    torch.testing.assert_close(queries @ codes.T, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse_encoder(dense, sae, queries="codes").encode_query(TEXTS).to_dense(), codes)


@torch.no_grad()
def test_refined_codes_say_more_with_as_many_latents_and_keep_their_slices(dense, tmp_path: Path) -> None:
    sae = an_sae()
    rows = dense.encode(TEXTS, convert_to_tensor=True) - sae.b_dec
    codes = [sparse_encoder(dense, sae, refine=steps).encode(TEXTS).to_dense() for steps in (0, 1, 10)]
    errors = [(rows - code @ sae.W_dec).square().sum(1) for code in codes]
    assert (errors[1] < errors[0]).all() and (errors[2] <= errors[1]).all()
    assert all(torch.equal((code > 0).sum(1), (codes[0] > 0).sum(1)) and (code >= 0).all() for code in codes)
    # With the support that was found, values are nearly those of least squares.
    on = codes[2][0] > 0
    fitted = torch.linalg.lstsq(sae.W_dec[on].T.double(), rows[0].double()).solution
    best = (rows[0].double() - fitted @ sae.W_dec[on].double()).square().sum()
    assert best <= errors[2][0] <= 1.05 * best
    encoder = sparse_encoder(dense, sae, refine=10)
    assert torch.equal(encoder.encode(TEXTS, width=40).to_dense()[:, :40], codes[2][:, :40])
    encoder.save_pretrained(str(tmp_path))
    assert torch.equal(LatentEncoder(str(tmp_path)).encode(TEXTS).to_dense(), codes[2])


@pytest.mark.parametrize("text", [" ", "word " * 5000])
def test_any_text_has_a_code(encoder, text: str) -> None:
    assert encoder.encode(text).to_dense().isfinite().all()


def test_texts_without_a_token_are_refused(encoder) -> None:
    with pytest.raises(ValueError, match="no token to read"):
        encoder.encode([""])


def test_what_does_not_fit_is_refused(dense, encoder) -> None:
    with pytest.raises(ValueError, match="reads embeddings of width 64 .* this model's have 128"):
        sparse_encoder(dense, build_sae(TopKSAEConfig(d_in=64, num_latents=F, k=8)))
    with pytest.raises(ValueError, match=r"reads model.layers.1 of lm, not the embeddings of whole texts"):
        sparse_encoder(
            dense, build_sae(TopKSAEConfig(d_in=128, num_latents=F, k=8, hookpoint="model.layers.1", base_model="lm"))
        )
    with pytest.raises(ValueError, match="numbered 0 to 95 here, got -1"):
        encoder.name_of(-1)
    with pytest.raises(ValueError, match="`width` must be between 1 and the SAE's 96 latents, got 97"):
        sparse_encoder(dense, an_sae(), width=97)
    with pytest.raises(ValueError, match="must be one of embedding, max"):
        sparse_encoder(dense, an_sae(), pooling="mean")
    with pytest.raises(ValueError, match="`projections` for an SAE that reads pooled embeddings"):
        sparse_encoder(dense, an_sae(), pooling="max", queries="projections")
    with pytest.raises(ValueError, match="`refine` is a number of steps"):
        sparse_encoder(dense, an_sae(), pooling="max", refine=3)
    with pytest.raises(ValueError, match="between 1 and 96, the latents of this encoder; got 0"):
        encoder.encode(TEXTS, width=0)
