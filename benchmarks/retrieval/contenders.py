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


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def dense_rows(data: Embedded) -> Iterator[Row]:
    """The embedding itself, with fewer bits, with fewer dimensions."""
    queries, documents, dimension = data.queries, data.documents, data.queries.shape[1]
    yield Row("dense", "float32", 4 * dimension, queries @ unit(documents).T)
    scale = documents.abs().amax(0) / 127
    yield Row("int8", "", dimension, queries @ unit((documents / scale).round() * scale).T)
    yield Row("binary", "", dimension / 8, queries @ unit((documents > 0).float() * 2 - 1).T)
    mean = data.training.mean(0)
    axes = torch.linalg.eigh(torch.cov((data.training - mean).T)).eigenvectors.flip(1)
    for kept in (8, 16, 32, 64, 96, 128, 192):
        yield Row("truncation", f"{kept}", 4 * kept, queries[:, :kept] @ unit(documents[:, :kept]).T)
        yield Row(
            "PCA", f"{kept}", 4 * kept, (queries - mean) @ axes[:, :kept] @ unit((documents - mean) @ axes[:, :kept]).T
        )


def pq_rows(data: Embedded) -> Iterator[Row]:
    """Product quantisation with 256 centres a part (Jegou et al. 2011), after a random rotation."""
    dimension = data.queries.shape[1]
    sample = data.training[:: max(1, len(data.training) // 10_000)]  # enough for 256 centres
    rotation = torch.linalg.qr(torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(0)))[0]
    for parts in (16, 48, 96):
        learnt, stored = ((rows @ rotation).chunk(parts, 1) for rows in (sample, data.documents))
        kept = [_nearest(rows, _centres(some)) for some, rows in zip(learnt, stored, strict=True)]
        yield Row("product quantisation", f"{parts}", parts, data.queries @ unit(torch.cat(kept, 1) @ rotation.T).T)


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


def sparse_bytes(codes: Tensor) -> float:
    """Mean bytes of documents whose codes are `(N, F)`; the same count for every sparse code."""
    return (codes > 0).float().sum(1).mean().item() * (8 + math.ceil(math.log2(codes.shape[1]))) / 8


def rounded(codes: Tensor) -> Tensor:
    """Codes `(N, F)` with values of 8 bits: 255 steps up to each document's largest."""
    scale = codes.amax(1, keepdim=True).clamp(min=1e-12) / 255
    return (codes / scale).round() * scale


@torch.no_grad()
def sae_rows(name: str, sae: SAEModel, data: Embedded, widths: list[int]) -> Iterator[Row]:
    """An SAE's codes at several widths, for queries that are codes too and for queries' projections."""
    bits = 8 + math.ceil(math.log2(sae.config.num_latents))
    documents = sae.encode(data.documents, selection="mask").to_dense()
    queries = sae.encode(data.queries, selection="mask").to_dense()
    projections = (data.queries - sae.b_dec) @ sae.W_dec.T
    for width in widths:
        kept = rounded(documents[:, :width])
        size = (kept > 0).float().sum(1).mean().item() * bits / 8
        yield Row(name, f"{width}", size, projections[:, :width] @ unit(kept).T)
        yield Row(f"{name}, queries as codes", f"{width}", size, unit(queries[:, :width]) @ unit(kept).T)


@torch.no_grad()
def byte_code_rows(sae: SAEModel, data: Embedded) -> Iterator[Row]:
    """The byte code of `progressive/` at each prefix width."""
    for width in sae.prefix_widths:
        kept = sae.truncate(width)
        statistics = latent_statistics(kept, [data.training], neighbours=0)
        code = encode_progressive(kept, data.documents, statistics)
        decoded = decode_progressive(kept, code, statistics)
        yield Row("byte code", f"{width}", len(code) / len(data.documents), data.queries @ unit(decoded - sae.b_dec).T)


@torch.no_grad()
def csr_rows(name: str, module: torch.nn.Module, data: Embedded) -> Iterator[Row]:
    """CSR's codes, for queries that are codes too, as its library has them, and for queries' projections."""
    with torch.inference_mode():
        documents = rounded(module({"sentence_embedding": data.documents})["sentence_embedding"])
        queries = module({"sentence_embedding": data.queries})["sentence_embedding"]
        projections = (data.queries - module.pre_bias) @ module.encoder.weight.T
        size = sparse_bytes(documents)
        yield Row(name, f"k {module.k}", size, projections @ unit(documents).T)
        yield Row(f"{name}, queries as codes", f"k {module.k}", size, unit(queries) @ unit(documents).T)


def bm25_scores(queries: list[str], documents: list[str]) -> tuple[Tensor, float]:
    """BM25's scores `(Q, N)` (k1 1.5, b 0.75), and the bytes of a document's postings: 4 + 1 each."""
    import bm25s

    words = bm25s.tokenize(documents, stopwords="en", show_progress=False)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    asked = bm25s.tokenize(queries, stopwords="en", show_progress=False, return_ids=False)
    scores = torch.stack([torch.from_numpy(index.get_scores(tokens)) for tokens in asked])
    return scores, 5 * sum(len(set(ids)) for ids in words.ids) / len(documents)
