"""Sentence embeddings as sparse codes of any width: sentence-transformers modules, and search from coarse to fine.

Needs sentence-transformers: `pip install 'hf_matryoshka_sae[retrieval]'`.
"""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from .encoder import LatentEncoder, sparse_encoder
    from .names import name_latents
    from .search import Hits, SparseIndex, qdrant_index, to_scipy, to_torch
    from .sparse_embedding import SparseEmbedding
    from .whitening import half_whitened


__all__ = [
    "Hits",
    "LatentEncoder",
    "SparseEmbedding",
    "SparseIndex",
    "half_whitened",
    "name_latents",
    "qdrant_index",
    "sparse_encoder",
    "to_scipy",
    "to_torch",
]

__getattr__, __dir__ = imports_on_use(__name__)
