"""The sums of `sparse_ops` as matmuls, for batches in which so many latents fire that pairs would cost more.

ReLU, JumpReLU and Gated SAEs begin so: about half of all latents fire. Pairs then take more memory than the N x F
tensors that are built here, and several times the time.

Shapes: N tokens, D `d_in`, F `num_latents`, P prefixes, M pairs.
"""

import torch
from torch import Tensor


# From this share of N x F on, matmuls are faster (measured on a CPU at d_in 512; both sides grow alike with d_in).
_SHARE = 1 / 8
# With fewer pairs the time does not matter. Added up one by one, as small matmuls do too, their sums are those of
# other libraries to the last bits.
_FEWEST = 2**17
_ROWS = 2**16  # rows of a matrix that are converted at once


def worthwhile(num_pairs: int, num_rows: int, num_latents: int) -> bool:
    """Whether matmuls are cheaper for so many pairs."""
    return num_pairs >= _FEWEST and num_pairs > _SHARE * num_rows * num_latents


def spread(values: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tensor:
    """The `(N, F)` tensor that holds `values` at its pairs and 0 elsewhere."""
    return values.new_zeros(shape[0] * shape[1]).index_copy_(0, rows * shape[1] + cols, values).view(shape)


def decode_groups(latents: Tensor, W_dec: Tensor, widths: tuple[int, ...]) -> Tensor:
    """What each group of latents decodes to, `(N, P, D)`."""
    return torch.stack([latents[:, group] @ W_dec[group] for group in _groups(widths)], 1)


def latent_gradients(gradient: Tensor, W_dec: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Gradients to the latents `(N, F)` from those `(N, P, D)` of the group sums."""
    out = gradient.new_zeros(len(gradient), len(W_dec))
    for p, group in enumerate(_groups(widths)):
        out[:, group] = gradient[:, p] @ W_dec[group].T
    return out


def decoder_gradients(gradient: Tensor, latents: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Gradients to the decoder `(F, D)` from those `(N, P, D)` of the group sums."""
    out = gradient.new_zeros(latents.shape[1], gradient.shape[-1])
    for p, group in enumerate(_groups(widths)):
        out[group] = latents[:, group].T @ gradient[:, p]
    return out


def _groups(widths: tuple[int, ...]) -> list[slice]:
    return [slice(start, end) for start, end in zip((0, *widths), widths, strict=False)]


def matrix_vector(rows: Tensor, vector: Tensor) -> Tensor:
    """`rows @ vector` in the type of `vector`, without a copy of all rows where theirs is another."""
    return torch.cat([part.to(vector.dtype) @ vector for part in rows.split(_ROWS)])


def vector_matrix(vector: Tensor, rows: Tensor) -> Tensor:
    """`vector @ rows`, likewise."""
    if vector.dtype == rows.dtype:
        return vector @ rows
    return sum(a @ part.to(vector.dtype) for a, part in zip(vector.split(_ROWS), rows.split(_ROWS), strict=True))
