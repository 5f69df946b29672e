"""What is measured: ways to store the embeddings of documents, and to score queries against them.

Each gives rows of (name, bytes of a document, score of every document for every query). Bytes are those of what is
stored for a document alone: 4 for a float32, 1 for an int8, 1/8 for a bit; of a sparse code, ours or CSR's, an int8
value and ceil(log2 F) bits of index for each latent that is not 0. Queries are never rounded.

Shapes: N documents, Q queries, D dimensions, F latents.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.progressive import decode_progressive, encode_progressive, latent_statistics
from hf_matryoshka_sae.retrieval.sparse_embedding import refined


REFINE = 10  # steps
HALF = "half-whitened "


@dataclass
class Row:
    """One point of the plot.

    Args:
        name (`str`): The method.
        size (`str`): Which of its sizes.
        bytes (`float`): Of a document, mean.
        scores (`Tensor` of shape `(Q, N)`): Of every document.
    """

    name: str
    size: str
    bytes: float
    scores: Tensor


@dataclass
class Embedded:
    """Dense embeddings `(Q, D)`, `(N, D)` of what is searched, and `(M, D)` of what is learnt from."""

    queries: Tensor
    documents: Tensor
    training: Tensor


def half_whitened(data: Embedded) -> Embedded:
    """The embeddings as `retrieval.half_whitened` makes them, from those that are learnt from."""
    mean = data.training.mean(0)
    values, axes = torch.linalg.eigh(torch.cov((data.training - mean).T))
    matrix = axes * values.clamp(min=1e-6 * float(values.max())).pow(-0.25) @ axes.T
    return Embedded(*(unit((rows - mean) @ matrix) for rows in (data.queries, data.documents, data.training)))


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def plain_rows(data: Embedded, prefix: str = "") -> Iterator[Row]:
    """The embedding itself, and with fewer bits."""
    queries, documents, dimension = data.queries, data.documents, data.queries.shape[1]
    yield Row(f"{prefix}dense", "float32", 4 * dimension, queries @ unit(documents).T)
    scale = documents.abs().amax(0) / 127
    yield Row(f"{prefix}int8", "", dimension, queries @ unit((documents / scale).round() * scale).T)
    yield Row(f"{prefix}binary", "", dimension / 8, queries @ unit((documents > 0).float() * 2 - 1).T)


def cut_rows(data: Embedded) -> Iterator[Row]:
    """The embedding with fewer dimensions."""
    queries, documents = data.queries, data.documents
    mean = data.training.mean(0)
    axes = torch.linalg.eigh(torch.cov((data.training - mean).T)).eigenvectors.flip(1)
    for kept in (8, 16, 32, 64, 96, 128, 192):
        yield Row("truncation", f"{kept}", 4 * kept, queries[:, :kept] @ unit(documents[:, :kept]).T)
        yield Row(
            "PCA", f"{kept}", 4 * kept, (queries - mean) @ axes[:, :kept] @ unit((documents - mean) @ axes[:, :kept]).T
        )


def pq_rows(data: Embedded, prefix: str = "") -> Iterator[Row]:
    """Product quantisation with 256 centres a part (Jegou et al. 2011), after a random rotation."""
    dimension = data.queries.shape[1]
    sample = data.training[:: max(1, len(data.training) // 10_000)]  # enough for 256 centres
    rotation = torch.linalg.qr(torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(0)))[0]
    for parts in (16, 48, 96):
        learnt, stored = ((rows @ rotation).chunk(parts, 1) for rows in (sample, data.documents))
        kept = [_nearest(rows, _centres(some)) for some, rows in zip(learnt, stored, strict=True)]
        yield Row(
            f"{prefix}product quantisation", f"{parts}", parts, data.queries @ unit(torch.cat(kept, 1) @ rotation.T).T
        )


def _centres(rows: Tensor, count: int = 256, steps: int = 20) -> Tensor:
    """Centres of k-means by Lloyd's steps, from rows spread evenly; a centre of nothing stays."""
    centres = rows[:: len(rows) // count][:count].clone()
    for _ in range(steps):
        nearest = torch.cdist(rows, centres).argmin(1)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return centres[torch.cdist(rows, centres).argmin(1)]


def sparse_bytes(codes: Tensor, num_latents: int) -> float:
    """Mean bytes of documents whose codes are `(N, n)`; the same count for every sparse code of F latents."""
    return (codes > 0).float().sum(1).mean().item() * (8 + math.ceil(math.log2(num_latents))) / 8


def rounded(codes: Tensor) -> Tensor:
    """Codes `(N, F)` with values of 8 bits: 255 steps up to each document's largest."""
    scale = codes.amax(1, keepdim=True).clamp(min=1e-12) / 255
    return (codes / scale).round() * scale


@torch.no_grad()
def sparse_rows(
    name: str, codes: tuple[Tensor, Tensor], decoder: Tensor, bias: Tensor, data: Embedded, widths: list[int]
) -> Iterator[Row]:
    """Rows of codes `(N, F)` of documents and `(Q, F)` of queries, cut to several widths.

    As they are, for queries that are codes and for queries' projections; and refined, with documents' lengths those of
    what their codes stand for.
    """
    documents, queries = codes
    best = refined(documents, data.documents - bias, decoder, REFINE)
    projections = (data.queries - bias) @ decoder.T
    for width in widths:
        asked = projections[:, :width]
        kept, fitted = rounded(documents[:, :width]), rounded(best[:, :width])
        size, as_many = sparse_bytes(kept, len(decoder)), sparse_bytes(fitted, len(decoder))
        yield Row(f"{name}, queries as codes", f"{width}", size, unit(queries[:, :width]) @ unit(kept).T)
        yield Row(f"{name}, not refined", f"{width}", size, asked @ unit(kept).T)
        lengths = (fitted @ decoder[:width]).norm(dim=1).clamp(min=1e-12)
        yield Row(name, f"{width}", as_many, asked @ fitted.T / lengths)


@torch.no_grad()
def sae_rows(name: str, sae: SAEModel, data: Embedded, widths: list[int]) -> Iterator[Row]:
    """An SAE's codes at several widths; see [`sparse_rows`]."""
    codes = tuple(sae.encode(rows, selection="mask").to_dense() for rows in (data.documents, data.queries))
    yield from sparse_rows(name, codes, sae.W_dec, sae.b_dec, data, widths)


@torch.no_grad()
def byte_code_rows(name: str, sae: SAEModel, data: Embedded) -> Iterator[Row]:
    """The byte code of `progressive/` at each prefix width."""
    for width in sae.prefix_widths:
        kept = sae.truncate(width)
        statistics = latent_statistics(kept, [data.training], neighbours=0)
        code = encode_progressive(kept, data.documents, statistics)
        decoded = decode_progressive(kept, code, statistics)
        yield Row(name, f"{width}", len(code) / len(data.documents), data.queries @ unit(decoded - sae.b_dec).T)


@torch.no_grad()
def csr_rows(name: str, module: torch.nn.Module, data: Embedded) -> Iterator[Row]:
    """CSR's codes, as its library has them ("queries as codes") and with all that ours get."""
    codes = tuple(
        module({"sentence_embedding": rows.clone()})["sentence_embedding"] for rows in (data.documents, data.queries)
    )
    decoder = module.encoder.weight.detach()
    yield from sparse_rows(name, codes, decoder, module.pre_bias.detach(), data, [len(decoder)])


def bm25_scores(queries: list[str], documents: list[str]) -> tuple[Tensor, float]:
    """BM25's scores `(Q, N)` (k1 1.5, b 0.75), and the bytes of a document's postings: 4 + 1 each."""
    import bm25s

    words = bm25s.tokenize(documents, stopwords="en", show_progress=False)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    asked = bm25s.tokenize(queries, stopwords="en", show_progress=False, return_ids=False)
    scores = torch.stack([torch.from_numpy(index.get_scores(tokens)) for tokens in asked])
    return scores, 5 * sum(len(set(ids)) for ids in words.ids) / len(documents)
