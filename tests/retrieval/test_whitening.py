"""Half-whitened embeddings, against their definition in float64."""

from pathlib import Path

import pytest
import torch


pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer

from hf_matryoshka_sae.assets import embedded_lm_path
from hf_matryoshka_sae.retrieval import half_whitened


def test_embeddings_are_half_whitened_and_the_model_saves(tmp_path: Path) -> None:
    dense = SentenceTransformer(str(embedded_lm_path()), device="cpu")
    texts = ["Return the number of items.", "A violin concert"]
    before = dense.encode(texts, convert_to_tensor=True).double()
    scale = torch.logspace(0, -2, 128)
    rows = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0)) * scale + before.mean(0).float()
    made = half_whitened(dense, rows)
    # Of a whitened covariance C^(-1/4) C C^(-1/4) is the root of C.
    centred = rows.double() - rows.double().mean(0)
    covariance = centred.T @ centred / (len(rows) - 1)
    values, axes = torch.linalg.eigh(covariance)
    expected = (before - rows.double().mean(0)) @ (axes @ torch.diag(values**-0.25) @ axes.T)
    expected = expected / expected.norm(dim=1, keepdim=True)
    found = made.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    made.save_pretrained(str(tmp_path))
    assert torch.equal(SentenceTransformer(str(tmp_path), device="cpu").encode(texts, convert_to_tensor=True), found)


def test_too_few_texts_are_refused() -> None:
    dense = SentenceTransformer(str(embedded_lm_path()), device="cpu")
    with pytest.raises(ValueError, match="more than 128 texts"):
        half_whitened(dense, torch.randn(100, 128))
