"""Search in sparse codes, coarse to fine: the first latents find candidates, more latents rank them.

    score(q, d) = sum over latents i < width of q_i d_i              ("dot"; "cosine" divides by both lengths)

One index serves every width: codes are stored by latent, so that a query reads the postings of its own latents alone,
and of a prefix only those below it. The score is a sum over latents, so each hit says which of them it is made of.

Shapes: N documents, Q queries, F latents.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor


_QUERIES = 256  # that are scored at once; documents that are decoded at once


@dataclass
class Hits:
    """Documents found for each query, best first.

    Args:
        documents (`np.ndarray` of shape `(Q, K)`): Numbers of documents; -1 where fewer share a latent.
        scores (`np.ndarray` of shape `(Q, K)`): Their scores; 0 there.
        work (`float`): Products of a query's and a document's value, mean over queries.
    """

    documents: np.ndarray
    scores: np.ndarray
    work: float

    def as_lists(self) -> list[list[dict[str, int | float]]]:
        """The hits as sentence-transformers' search functions give them: `corpus_id` and `score` of each."""
        return [
            [{"corpus_id": int(d), "score": float(s)} for d, s in zip(row, values, strict=True) if d >= 0]
            for row, values in zip(self.documents, self.scores, strict=True)
        ]


class SparseIndex:
    """Codes of documents, searched at any width.

    Args:
        codes (`Tensor` of shape `(N, F)`, or a scipy sparse matrix): What `encode_document` gives.
        similarity (`str`, *optional*, defaults to `"cosine"`): `cosine` or `dot`. The cosine at
            a width is that of codes cut to it.
        decoder (`Tensor` of shape `(F, D)`, *optional*): The SAE's decoder rows: the length of a document then is that
            of what its code stands for, not that of the code, and ranks better where queries are projections.

    Raises:
        `ValueError`: if codes are not finite, no matrix, the similarity is unknown, or there are not F decoder rows.
    """

    def __init__(self, codes: Any, similarity: str = "cosine", decoder: Tensor | None = None) -> None:
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"`similarity` must be 'cosine' or 'dot', got {similarity!r}.")
        self.similarity = similarity
        self.by_document = _checked_codes(codes)
        self.by_latent = self.by_document.tocsc()
        if decoder is not None and len(decoder) != self.num_latents:
            raise ValueError(f"Codes have {self.num_latents} latents, and there are {len(decoder)} decoder rows.")
        self._decoder = None if decoder is None else decoder.detach().cpu().float().numpy()
        self._inverse: dict[int, np.ndarray] = {}  # of the documents' lengths, by width

    def __len__(self) -> int:
        return self.by_document.shape[0]

    @property
    def num_latents(self) -> int:
        """F."""
        return self.by_document.shape[1]

    def search(
        self,
        queries: Any,
        top_k: int = 10,
        width: int | None = None,
        coarse_width: int | None = None,
        candidates: int = 100,
        coarse_dims: int | None = None,
    ) -> Hits:
        """The documents of the highest scores.

        Args:
            queries (`Tensor` of shape `(Q, F)`, or a scipy sparse matrix): What `encode_query` gives, of any width.
            top_k (`int`, *optional*, defaults to 10): Documents for each query.
            width (`int`, *optional*): Only the first `width` latents count; by default all.
            coarse_width (`int`, *optional*): Find `candidates` by the first so many latents, and rank these alone by
                `width`.
            candidates (`int`, *optional*, defaults to 100): Of the coarse search.
            coarse_dims (`int`, *optional*): Only so many of a query's largest values take part in the coarse search.

        Returns:
            [`Hits`]; of equal scores the first document stands first.

        Raises:
            `ValueError`: if queries are of another dimension, a width is not between 1 and F, or nothing is asked for.
        """
        rows = _checked_codes(queries)
        if rows.shape[1] != self.num_latents:
            raise ValueError(f"Queries have {rows.shape[1]} latents, the documents of this index {self.num_latents}.")
        width = self._checked(width, "width")
        if top_k < 1 or candidates < 1:
            raise ValueError(f"`top_k` and `candidates` must be at least 1, got {top_k} and {candidates}.")
        if coarse_width is None:
            parts = [self._whole(part, width, top_k) for part in _pieces(rows)]
        else:
            coarse_width = self._checked(coarse_width, "coarse_width")
            kept = max(candidates, top_k)
            parts = [self._refined(part, width, top_k, coarse_width, kept, coarse_dims) for part in _pieces(rows)]
        documents, scores = (np.concatenate([getattr(p, name) for p in parts]) for name in ("documents", "scores"))
        return Hits(documents, scores, sum(part.work * len(part.scores) for part in parts) / max(1, rows.shape[0]))

    def _whole(self, rows: sparse.csr_matrix, width: int, top_k: int) -> Hits:
        """The best by the first latents."""
        first = rows[:, :width]
        scores = (first @ self.by_latent[:, :width].T).toarray() * self._scale(first, width)
        work = np.diff(self.by_latent.indptr)[first.indices].sum() / max(1, first.shape[0])
        return Hits(*_best(scores, top_k), float(work))

    def _refined(
        self, rows: sparse.csr_matrix, width: int, top_k: int, coarse_width: int, kept: int, dims: int | None
    ) -> Hits:
        """The best by the first latents of those that a narrower prefix finds."""
        coarse = _largest(rows[:, :coarse_width], dims)
        candidates = self._whole(coarse, coarse_width, kept)
        number, place = np.nonzero(candidates.documents >= 0)
        document = candidates.documents[number, place]
        postings = self.by_document[document, :width].tocoo()
        query, done = rows[:, :width].toarray(), coarse.toarray()
        values = query[number[postings.row], postings.col]
        fine = np.full(candidates.documents.shape, -np.inf, np.float32)
        fine[number, place] = np.bincount(postings.row, values * postings.data, len(number))
        fine[number, place] *= self._scale(rows[:, :width], width)[number, document]
        seen = postings.col < coarse_width  # what the coarse search has multiplied is not multiplied again
        seen[seen] = done[number[postings.row[seen]], postings.col[seen]] != 0
        work = candidates.work + float(((values != 0) & ~seen).sum()) / max(1, len(candidates.scores))
        order = np.lexsort((candidates.documents, -fine), axis=1)[:, :top_k]
        scores, documents = np.take_along_axis(fine, order, 1), np.take_along_axis(candidates.documents, order, 1)
        return Hits(documents, np.where(documents >= 0, scores, 0), work)

    def explain(self, query: Any, document: int, width: int | None = None) -> list[tuple[int, float]]:
        """The latents that a query and a document share, with their share of the score, largest first.

        Args:
            query (`Tensor` of shape `(F,)`, or one row of a scipy sparse matrix): A query's code.
            document (`int`): Number of the document.
            width (`int`, *optional*): Only the first `width` latents.

        Raises:
            `ValueError`: if there is no such document.
        """
        if not 0 <= document < len(self):
            raise ValueError(f"Documents are numbered 0 to {len(self) - 1} here, got {document}.")
        width = self._checked(width, "width")
        row = query[None] if isinstance(query, Tensor) and query.ndim == 1 else query
        products = _checked_codes(row)[0, :width].multiply(self.by_document[document, :width]).tocoo()
        total = products.data.sum()
        parts = [
            (int(latent), float(value / total)) for latent, value in zip(products.col, products.data, strict=True)
        ]
        return sorted(parts, key=lambda part: (-part[1], part[0]))

    def _scale(self, rows: sparse.csr_matrix, width: int) -> np.ndarray:
        """What products `(Q, N)` of the first latents are multiplied by to become scores."""
        if self.similarity == "dot":
            return np.ones((rows.shape[0], len(self)), np.float32)
        if width not in self._inverse:
            self._inverse[width] = _inverse_lengths(self.by_document[:, :width], self._decoder)
        return np.outer(_inverse_lengths(rows), self._inverse[width])

    def _checked(self, width: int | None, name: str) -> int:
        if width is not None and not 1 <= width <= self.num_latents:
            raise ValueError(f"`{name}` must be between 1 and {self.num_latents}, got {width}.")
        return width or self.num_latents


def _checked_codes(codes: Any) -> sparse.csr_matrix:
    matrix = to_scipy(codes).astype(np.float32)
    if not np.isfinite(matrix.data).all():
        raise ValueError("Codes hold numbers that are not finite: a text's embedding was NaN or infinite.")
    return matrix


def _inverse_lengths(rows: sparse.csr_matrix, decoder: np.ndarray | None = None) -> np.ndarray:
    if decoder is None:
        squares = np.asarray(rows.multiply(rows).sum(1)).ravel()
    else:
        squares = np.concatenate([np.square(part @ decoder[: rows.shape[1]]).sum(1) for part in _pieces(rows)])
    return (1 / np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny))).astype(np.float32)


def _pieces(rows: sparse.csr_matrix) -> list[sparse.csr_matrix]:
    """Some queries at a time: scores of all documents are dense."""
    return [rows[start : start + _QUERIES] for start in range(0, max(1, rows.shape[0]), _QUERIES)]


def to_scipy(codes: Any) -> sparse.csr_matrix:
    """Codes `(N, F)` as a scipy matrix by rows.

    Args:
        codes (`Tensor` of shape `(N, F)`, or a scipy sparse matrix): Sparse or dense.

    Raises:
        `ValueError`: if they are no matrix.
    """
    if sparse.issparse(codes):
        return sparse.csr_matrix(codes)
    if not isinstance(codes, Tensor) or codes.ndim != 2:
        raise ValueError(f"Codes must be a tensor (N, F), got {getattr(codes, 'shape', type(codes).__name__)}.")
    entries = codes.detach().cpu().float().to_sparse().coalesce()
    rows, cols = entries.indices().numpy()
    return sparse.csr_matrix((entries.values().numpy(), (rows, cols)), shape=tuple(codes.shape))


def to_torch(codes: sparse.csr_matrix) -> Tensor:
    """Codes of scipy as the sparse tensor that sentence-transformers' search functions take."""
    entries = codes.tocoo()
    return torch.sparse_coo_tensor(
        np.stack([entries.row, entries.col]), entries.data, entries.shape, check_invariants=True
    ).coalesce()


def qdrant_index(codes: Any, location: str = ":memory:") -> tuple[Any, str]:
    """A collection of Qdrant with the codes of documents, for `semantic_search_qdrant(..., corpus_index=)`.

    Args:
        codes (see [`to_scipy`]): Codes of the documents; their numbers become ids.
        location (`str`, *optional*, defaults to `":memory:"`): Where the client finds Qdrant.

    Returns:
        The client and the name of the collection.

    Raises:
        `ValueError`: if `qdrant-client` is not installed.
    """
    try:
        from qdrant_client import QdrantClient, models
    except ImportError as error:
        raise ValueError("`qdrant_index` needs Qdrant's client: `pip install qdrant-client`.") from error
    client, name, matrix = QdrantClient(location), "documents", to_scipy(codes)
    client.create_collection(name, vectors_config={}, sparse_vectors_config={"text": models.SparseVectorParams()})
    points = []
    for number in range(matrix.shape[0]):
        row = matrix[number]
        vector = models.SparseVector(indices=row.indices.tolist(), values=row.data.tolist())
        points.append(models.PointStruct(id=number, vector={"text": vector}))
    client.upload_points(name, points)
    return client, name


def _largest(rows: sparse.csr_matrix, count: int | None) -> sparse.csr_matrix:
    """The `count` values of each row that are largest in size, which are all where there are fewer."""
    if count is None:
        return rows
    rows = rows.copy()
    for start, stop in itertools.pairwise(rows.indptr):
        size = np.abs(rows.data[start:stop])
        if len(size) > count:
            rows.data[start:stop][np.argsort(-size, kind="stable")[count:]] = 0
    rows.eliminate_zeros()
    return rows


def _best(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores `(Q, K)` of the best documents; -1 and 0 where a score is not above 0."""
    count = min(count, scores.shape[1])
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(scores, chosen, 1)
    return np.where(best > 0, chosen, -1), np.maximum(best, 0)
