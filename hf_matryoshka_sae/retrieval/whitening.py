"""Half-whitened sentence embeddings: directions in which texts differ little count for more.

    y = C^(-1/4) (x - m),  divided by its length          C, m: covariance and mean of embeddings x of some texts

Whitening (Su et al. 2021, arXiv 2103.15316) gives all directions the same variance; half of it, in the exponent, ranks
better here. An SAE of such embeddings spends its latents on what tells texts apart.
"""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor, nn


_LEAST = 1e-6  # of the largest variance: what lies below is rounding, not to be made larger


def half_whitened(model: str | Path | SentenceTransformer, texts: list[str] | Tensor) -> SentenceTransformer:
    """A sentence-transformers model whose embeddings are half-whitened, by two modules of that library at its end.

    Args:
        model (`str`, `Path` or `SentenceTransformer`): The model; a folder or Hub id is loaded.
        texts (`list[str]`, or `Tensor` of shape `(N, D)`): Texts of the kind that will be searched, or their
            embeddings; some thousands.

    Returns:
        `SentenceTransformer`: It saves and pushes as any other, and is what an SAE is trained on and used with.

    Raises:
        `ValueError`: if there are fewer texts than dimensions, or embeddings are not finite.
    """
    dense = model if isinstance(model, SentenceTransformer) else SentenceTransformer(str(model))
    rows = texts if isinstance(texts, Tensor) else dense.encode(texts, convert_to_tensor=True)
    size = dense.get_embedding_dimension()
    if rows.ndim != 2 or rows.shape[1] != size or len(rows) <= size or not rows.isfinite().all():
        raise ValueError(
            f"Whitening {size} dimensions needs finite embeddings of more than {size} texts, got {tuple(rows.shape)}."
        )
    rows = rows.cpu().double()
    mean = rows.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov((rows - mean).T))
    matrix = axes * variances.clamp(min=_LEAST * float(variances.max())).pow(-0.25) @ axes.T
    linear = Dense(size, size, True, nn.Identity(), matrix.float(), -(matrix @ mean).float())
    whitened = SentenceTransformer(modules=[*dense, linear, Normalize()], prompts=dense.prompts)
    return whitened.to(dense.device)
