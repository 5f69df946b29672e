"""Representational similarity: how well reconstructions keep which tokens are similar.

    S[i, j] = cos(x_i, x_j),  S^[i, j] = cos(x^_i, x^_j),  score = correlation of both over pairs i < j

with Spearman's correlation as the main score and Pearson's beside it. An identity scores 1. The score depends on the
tokens as much as on the dictionary, so [`TokenSample`] picks the same ones for every dictionary.

Shapes: N tokens, D `d_in`, P prefixes, R resamples.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import normalize

from ..common.distributed import processes, shared_group
from ..common.intervals import middle_95, resampled_counts
from ..common.logs import progress
from .data import HasActivations, activation_batches


# The finalising steps of splitmix64 (Steele et al. 2014), as signed numbers.
_MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def checked_batches(
    activations: HasActivations | Iterable[Tensor], d_in: int | None = None, task: str | None = None
) -> Iterator[Tensor]:
    """Yield the batches of a source, each checked.

    Args:
        activations ([`HasActivations`] or iterable of `Tensor`): Batches of shape `(n, D)`.
        d_in (`int`, *optional*): Width D of every batch; by default that of the first.
        task (`str`, *optional*): Name of the progress bar that the first process shows; by default there is none.

    Raises:
        `ValueError`: for a batch that is no `(n, D)` tensor of finite numbers.
    """
    has_bar = task is not None and processes()[0] == 0
    batches = progress(activation_batches(activations), desc=task, unit="batch", disable=not has_bar, leave=False)
    for number, x in enumerate(batches):
        d_in = d_in if d_in is not None or x.dim() != 2 else x.shape[1]
        if x.dim() != 2 or x.shape[1] != d_in:
            expected = "D" if d_in is None else d_in
            raise ValueError(f"Activations must come as (n, {expected}); batch {number} has shape {tuple(x.shape)}.")
        if not x.isfinite().all():
            raise ValueError(
                f"Activations must be finite; batch {number} holds NaN or infinity. Run the language model in "
                "bfloat16 or float32, or leave those tokens out."
            )
        yield x


class TokenSample:
    """A uniform sample of a stream's tokens: the same ones, in the same order, for the same seed.

    Every token's key is a hash of the seed and of its own numbers, and the tokens with the `size` smallest keys are
    kept. So neither the cut into batches, nor their order, nor the number of processes changes the sample, and memory
    is `size` rows and a batch. Tokens with equal hidden states share a key: they are drawn together or not at all.

    Args:
        size (`int`): Tokens to keep; a shorter stream is kept whole.
        seed (`int`, *optional*, defaults to 0): Seed of the hash.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"`size` must be at least 1 token, got {size}.")
        self.size, self.seed, self.seen = size, seed, 0
        self._multipliers = torch.zeros(0, dtype=torch.int64)
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._rows: Tensor | None = None

    @classmethod
    def of(cls, activations: HasActivations | Iterable[Tensor], size: int, seed: int = 0) -> "TokenSample":
        """Return the sample of a whole stream."""
        sample = cls(size, seed)
        for x in checked_batches(activations, task="sampling tokens"):
            sample.add(x)
        return sample

    def add(self, x: Tensor) -> None:
        """Add the next tokens, `(n, D)`, to those that are sampled."""
        keys = self._hash(x)
        self.seen += len(x)
        if len(self._keys) == self.size:  # few rows still have a smaller key: copy only those
            better = keys < self._keys[-1]
            keys, x = keys[better], x[better.to(x.device)]
        rows = x if self._rows is None else torch.cat([self._rows, x])
        self._keys, self._rows = _smallest(torch.cat([self._keys, keys]), rows, self.size)

    def _hash(self, x: Tensor) -> Tensor:
        """Return a key `(n,)` for each row: odd multiples of its float32 bits, summed with wrap-around, then mixed."""
        if len(self._multipliers) != x.shape[1] + 1:
            integers = np.random.default_rng(self.seed).integers(-(2**63), 2**63, x.shape[1] + 1, dtype=np.int64)
            self._multipliers = torch.from_numpy(integers | 1)
        offset, multipliers = self._multipliers[0], self._multipliers[1:].to(x.device)
        bits = (x.float() + 0.0).contiguous().view(torch.int32)  # adding 0 makes -0 a 0
        keys = (bits * multipliers).sum(1).cpu() + offset
        for shift, factor in _MIXING:
            keys = (keys ^ (keys >> shift & (1 << 64 - shift) - 1)) * factor
        return keys ^ (keys >> 31 & (1 << 33) - 1)

    def tokens(self) -> Tensor:
        """Return the sampled tokens `(min(size, tokens seen), D)` of all processes, in the order of their keys.

        Raises:
            `ValueError`: if no token was seen.
        """
        if self._rows is None or not len(self._rows):
            raise ValueError("There are no tokens to sample from: the activations are empty.")
        if processes()[1] == 1:
            return self._rows
        return _smallest(*_gather(self._keys, self._rows, self.size), self.size)[1]


def _smallest(keys: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the `size` smallest keys in order, and their rows; copied, so that batches are freed."""
    kept = keys.argsort(stable=True)[:size]
    return keys[kept], rows[kept.to(rows.device)]


def _gather(keys: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return keys and rows of all processes; each sends `size`, padded with a key that no token has."""
    no_token = torch.iinfo(torch.int64).max
    padded_keys = torch.full((size,), no_token, dtype=torch.int64, device=rows.device)
    padded_keys[: len(keys)] = keys.to(rows.device)
    padded = rows.new_zeros(size, rows.shape[1])
    padded[: len(rows)] = rows
    world = processes()[1]
    all_keys = [torch.empty_like(padded_keys) for _ in range(world)]
    all_rows = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(all_keys, padded_keys, group=shared_group())
    dist.all_gather(all_rows, padded, group=shared_group())
    keys, rows = torch.cat(all_keys).cpu(), torch.cat(all_rows)
    is_token = keys != no_token
    return keys[is_token], rows[is_token.to(rows.device)]


@torch.no_grad()
def representational_similarity(
    x: Tensor, reconstructions: Tensor, centre: bool = False, resamples: int = 200, seed: int = 0
) -> list[dict[str, Any]]:
    """Return how well each prefix's reconstructions keep the cosine similarities between tokens.

    The interval is a bootstrap over tokens, not over pairs, which are not independent. A resample gives token i the
    weight w_i, the number of times it was drawn, and the pair (i, j) the weight w_i w_j; a token with itself is no
    pair however often it was drawn. Spearman's ranks are those of the whole sample (they are not ranked anew), so that
    a resample costs one product of matrices. The interval spans the 2.5th to the 97.5th percentile.

    Memory is about eight N x N matrices in float64: 64 MB at N = 1000, 1.6 GB at N = 5000.

    Args:
        x (`Tensor` of shape `(N, D)`): Hidden states.
        reconstructions (`Tensor` of shape `(P, N, D)`): Reconstructions of the same tokens by each prefix.
        centre (`bool`, *optional*, defaults to `False`): Subtract from `x`, and from each prefix's reconstructions,
            their mean over tokens: where the mean is large, raw cosines are all near 1.
        resamples (`int`, *optional*, defaults to 200): Number R of resamples; 0 gives no interval.
        seed (`int`, *optional*, defaults to 0): Seed of the resamples.

    Returns:
        `list[dict]`: for each prefix `spearman`, `pearson` and their intervals `[low, high]` (`None` where all pairs
        are equally similar, as when no latent fires), `tokens`, `pairs`, `centred`, `resamples` and `seed`.

    Raises:
        `ValueError`: for other shapes, fewer than 3 tokens, or numbers that are not finite.
    """
    if x.dim() != 2 or reconstructions.dim() != 3 or reconstructions.shape[1:] != x.shape:
        raise ValueError(
            f"Expected hidden states (N, D) and reconstructions (P, N, D), got {tuple(x.shape)} and "
            f"{tuple(reconstructions.shape)}."
        )
    count = len(x)
    if count < 3:
        raise ValueError(f"Similarities need at least 3 tokens, got {count}.")
    if not (x.isfinite().all() and reconstructions.isfinite().all()):
        raise ValueError("Hidden states and reconstructions must be finite; they hold NaN or infinity.")
    weights = _weights(count, resamples, seed).to(x.device)
    target = _cosines(x, centre)
    target_ranks = _ranks(target)
    about = {
        "tokens": count,
        "pairs": count * (count - 1) // 2,
        "centred": centre,
        "resamples": resamples,
        "seed": seed,
    }
    scores = []
    for reconstruction in reconstructions:
        cosines = _cosines(reconstruction, centre)
        pearson, pearson_interval = _score(target, cosines, weights)
        spearman, spearman_interval = _score(target_ranks, _ranks(cosines), weights)
        scores.append(
            {
                "spearman": spearman,
                "spearman_interval": spearman_interval,
                "pearson": pearson,
                "pearson_interval": pearson_interval,
                **about,
            }
        )
    return scores


def _weights(count: int, resamples: int, seed: int) -> Tensor:
    """Return how often each resample drew each token, `(1 + R, N)`; first the sample as it is."""
    counts = resampled_counts(count, resamples, np.random.default_rng(seed))
    return torch.cat([torch.ones(1, count, dtype=torch.float64), torch.from_numpy(counts).double()])


def _cosines(x: Tensor, centre: bool) -> Tensor:
    """Return cosine similarities `(N, N)`; 0 with a row of zeros. Rounded, so that equal rows are equally similar."""
    x = x.double()
    x = normalize(x - x.mean(0) if centre else x, dim=1)
    return (x @ x.T).round(decimals=12)


def _ranks(similarities: Tensor) -> Tensor:
    """Return the ranks of the strict upper triangle, equal entries sharing their mean rank, as a symmetric matrix."""
    rows, cols = torch.triu_indices(*similarities.shape, offset=1, device=similarities.device)
    ranks = torch.from_numpy(rankdata(similarities[rows, cols].cpu().numpy())).to(similarities)
    matrix = torch.zeros_like(similarities)
    matrix[rows, cols] = ranks
    matrix[cols, rows] = ranks
    return matrix


def _score(left: Tensor, right: Tensor, weights: Tensor) -> tuple[float | None, list[float] | None]:
    """Return the correlation of two symmetric matrices over pairs i < j, and its 95% interval over resamples."""
    left, right = _standardised(left), _standardised(right)
    if left is None or right is None:
        return None, None
    score, *resampled = _weighted_correlations(left, right, weights).tolist()
    known = [each for each in resampled if not math.isnan(each)]
    return score, middle_95(np.array(known)) if known else None


def _standardised(matrix: Tensor) -> Tensor | None:
    """Scale to mean 0 and variance 1 over pairs, zeros on the diagonal; return `None` where all pairs are equal."""
    outside = ~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    entries = matrix[outside]
    if entries.max() == entries.min():
        return None
    return ((matrix - entries.mean()) / entries.std(correction=0)).masked_fill(~outside, 0)


def _weighted_correlations(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Return the correlation `(R,)` under each row of weights, w_i w_j for pair (i, j); NaN without variance."""

    def total(matrix: Tensor) -> Tensor:
        return ((weights @ matrix) * weights).sum(1)

    pairs = weights.sum(1).square() - weights.square().sum(1)
    mean_left, mean_right = total(left) / pairs, total(right) / pairs
    covariance = total(left * right) / pairs - mean_left * mean_right
    variance_left = total(left.square()) / pairs - mean_left.square()
    variance_right = total(right.square()) / pairs - mean_right.square()
    product = (variance_left * variance_right).clamp(min=0)
    return torch.where(product > 0, covariance / product.sqrt(), torch.nan).clamp(-1, 1)
