"""Search in sparse codes, against dense products in float64."""

import numpy as np
import pytest
import torch

from hf_matryoshka_sae.retrieval import SparseIndex, qdrant_index, search, to_scipy, to_torch


F, DOCUMENTS, QUERIES = 48, 70, 9


def codes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, F, generator=generator)
    return values * (torch.rand(count, F, generator=generator) < 0.2)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return codes(DOCUMENTS, 1), codes(QUERIES, 2)


def dense_scores(documents: torch.Tensor, queries: torch.Tensor, similarity: str, width: int) -> np.ndarray:
    documents, queries = documents[:, :width].double(), queries[:, :width].double()
    if similarity == "cosine":
        documents, queries = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-30) for x in (documents, queries))
    return (queries @ documents.T).numpy()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("width", [F, 12])
def test_scores_are_those_of_dense_products(data, similarity: str, width: int) -> None:
    documents, queries = data
    hits = SparseIndex(documents, similarity).search(queries, top_k=5, width=width)
    scores = dense_scores(documents, queries, similarity, width)
    for row, found, values in zip(scores, hits.documents, hits.scores, strict=True):
        expected = np.sort(row)[::-1][:5]
        np.testing.assert_allclose(values, np.maximum(expected, 0), atol=1e-6)
        np.testing.assert_allclose(row[found[found >= 0]], values[found >= 0], atol=1e-6)


def test_lengths_may_be_those_of_what_codes_stand_for(data) -> None:
    documents, queries = data
    decoder = torch.randn(F, 20, generator=torch.Generator().manual_seed(3))
    hits = SparseIndex(documents, decoder=decoder).search(queries, top_k=3, width=12)
    lengths = (documents[:, :12].double() @ decoder[:12].double()).norm(dim=1).clamp(min=1e-15)
    expected = dense_scores(documents, queries, "dot", 12) / lengths.numpy()
    expected /= queries[:, :12].double().norm(dim=1, keepdim=True).clamp(min=1e-15).numpy()
    for row, found, values in zip(expected, hits.documents, hits.scores, strict=True):
        np.testing.assert_allclose(row[found[found >= 0]], values[found >= 0], atol=1e-6)
        np.testing.assert_allclose(np.sort(row)[::-1][: (found >= 0).sum()], values[found >= 0], atol=1e-6)


def test_a_coarse_search_that_keeps_every_document_changes_nothing(data, monkeypatch) -> None:
    documents, queries = data
    monkeypatch.setattr(search, "_QUERIES", 4)  # in several pieces
    index, queries = SparseIndex(documents + 1e-3), queries + 1e-3  # every document shares a latent with every query
    whole = index.search(queries, top_k=6)
    fine = index.search(queries, top_k=6, coarse_width=5, candidates=DOCUMENTS)
    assert (whole.documents == fine.documents).all()
    np.testing.assert_allclose(whole.scores, fine.scores, atol=1e-6)
    assert fine.work == pytest.approx(whole.work)  # the same products, in two parts
    assert index.search(queries, top_k=6, coarse_width=5, candidates=10).work < whole.work / 2


def test_candidates_of_the_coarse_search_are_ranked_by_the_whole_code(data) -> None:
    documents, queries = data
    hits = SparseIndex(documents, "dot").search(queries, top_k=3, coarse_width=12, candidates=8)
    coarse, fine = dense_scores(documents, queries, "dot", 12), dense_scores(documents, queries, "dot", F)
    for query in range(QUERIES):
        candidates = [d for d in np.argsort(-coarse[query], kind="stable")[:8] if coarse[query, d] > 0]
        best = sorted(candidates, key=lambda d: -fine[query, d])[:3]
        assert [d for d in hits.documents[query] if d >= 0] == best


def test_a_score_is_the_sum_of_its_latents(data) -> None:
    documents, queries = data
    index = SparseIndex(documents, "dot")
    hits = index.search(queries, top_k=1)
    parts = index.explain(queries[0], int(hits.documents[0, 0]))
    assert sum(share for _, share in parts) == pytest.approx(1)
    latent, share = parts[0]
    product = float(queries[0, latent] * documents[hits.documents[0, 0], latent])
    assert share == pytest.approx(product / float(hits.scores[0, 0]), rel=1e-5)


def test_texts_without_latents_are_found_by_nothing(data) -> None:
    documents, _ = data
    hits = SparseIndex(documents).search(torch.zeros(1, F), top_k=4)
    assert (hits.documents == -1).all() and hits.as_lists() == [[]]


def test_both_kinds_of_matrix_hold_the_same_codes(data) -> None:
    documents, _ = data
    assert torch.equal(to_torch(to_scipy(documents)).to_dense(), documents)


def test_qdrant_finds_the_same_through_sentence_transformers(data) -> None:
    pytest.importorskip("qdrant_client")
    search = pytest.importorskip("sentence_transformers.sparse_encoder.search_engines").semantic_search_qdrant
    documents, queries = data
    found, _ = search(queries.to_sparse(), corpus_index=qdrant_index(documents), top_k=4)
    own = SparseIndex(documents, "dot").search(queries, top_k=4).as_lists()
    assert [[hit["corpus_id"] for hit in row] for row in found] == [[hit["corpus_id"] for hit in row] for row in own]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda index: index.search(torch.zeros(1, F + 1)), "Queries have 49 latents"),
        (lambda index: index.search(torch.zeros(1, F), width=0), "between 1 and 48, got 0"),
        (lambda index: index.search(torch.zeros(1, F), top_k=0), "`top_k` and `candidates` must be at least 1"),
        (lambda index: index.explain(torch.zeros(F), DOCUMENTS), "Documents are numbered 0 to 69 here, got 70"),
        (lambda index: SparseIndex(torch.full((1, F), torch.nan)), "not finite"),
        (lambda index: SparseIndex(torch.zeros(F)), r"must be a tensor \(N, F\)"),
        (lambda index: SparseIndex(torch.zeros(1, F), "l2"), "'cosine' or 'dot'"),
        (lambda index: SparseIndex(torch.zeros(1, F), decoder=torch.zeros(3, 2)), "there are 3 decoder rows"),
    ],
)
def test_what_does_not_fit_is_refused(data, wrong, message: str) -> None:
    index = SparseIndex(data[0])
    with pytest.raises(ValueError, match=message):
        wrong(index)


def test_a_query_that_is_cut_to_its_largest_values_still_is_ranked_by_all(data) -> None:
    documents, queries = data
    index = SparseIndex(documents, "dot")
    hits = index.search(queries, top_k=2, coarse_width=F, candidates=6, coarse_dims=2)
    fine, cut = dense_scores(documents, queries, "dot", F), queries.clone()
    cut[cut < cut.topk(2, dim=1).values[:, -1:]] = 0
    coarse = dense_scores(documents, cut, "dot", F)
    for query in range(QUERIES):
        candidates = [d for d in np.argsort(-coarse[query], kind="stable")[:6] if coarse[query, d] > 0]
        best = sorted(candidates, key=lambda d: -fine[query, d])[:2]
        assert [d for d in hits.documents[query] if d >= 0] == best
