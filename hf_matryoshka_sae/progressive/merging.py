"""Merging near-duplicate latents, which loses less than dropping one of them.

Two latents with contributions `a_i ||d_i|| u_i` (u of length 1) and shares w of their energy `E[(a ||d||)^2]` become

    u = (w_i u_i + w_j u_j) / ||.||,    ||d|| = w_i ||d_i|| + w_j ||d_j||
    pre = (c_i ||d_i|| pre_i + c_j ||d_j|| pre_j) / ||d||

in which `c = u . u_i` where both mostly fire together, so that the contributions add up along u (least squares), and
`c = w_i (u . u_i)` where they hardly ever do, so that the merged latent reads what both read. Thresholds and biases
combine as pre-activations do. Latents in between are not duplicates.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import SAEModel
from ..models.sparse_ops import row_norms
from .statistics import LatentStatistics, nearest_latents


_EXCLUSIVE = 0.1  # of the rarer latent's tokens, at most, have both firing
_TOGETHER = 0.5  # of the more frequent latent's tokens, at least, have both firing
_NEIGHBOURS = 8  # candidates of each latent where there are no statistics


@dataclass
class Merged:
    """A dictionary in which near-duplicates are merged.

    Args:
        sae ([`SAEModel`]): The SAE with fewer latents, in their old order; a merged latent has the place and the id of
            the one that contributed more.
        pairs (`Tensor` of shape `(n, 2)`): Places in the old dictionary: the latent that stays, the one merged into
            it.
        statistics ([`LatentStatistics`], *optional*): Statistics of the new dictionary, where there were some of the
            old; those of a merged latent are estimated from the sums of both. Measure anew for exact ones.
    """

    sae: SAEModel
    pairs: Tensor
    statistics: LatentStatistics | None


def merge_latents(
    sae: SAEModel,
    threshold: float = 0.9,
    statistics: LatentStatistics | None = None,
    most: int | None = None,
) -> Merged:
    """Merge pairs of near-duplicate latents, the most similar first; each latent is in one pair at most.

    Near-duplicates have decoder rows of cosine above `threshold`, and by `statistics` fire together on at least half
    of the tokens of the more frequent one, or on at most a tenth of those of the rarer one. Without statistics their
    encoder rows have to be as similar, and they are taken to fire together. Latents of different groups of a
    Matryoshka SAE are never merged; its prefix widths shrink by what each prefix loses.

    Args:
        sae ([`SAEModel`]): An SAE of any family, which is not changed.
        threshold (`float`, *optional*, defaults to 0.9): Least cosine of decoder rows, above 0 and below 1.
        statistics ([`LatentStatistics`], *optional*): Statistics of this SAE, with neighbours.
        most (`int`, *optional*): Most pairs that are merged.

    Raises:
        `ValueError`: if the threshold is out of range, or the statistics are of another SAE or hold no neighbours.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` is a cosine above 0 and below 1, got {threshold}.")
    if statistics is not None:
        statistics.check(sae)
        if not statistics.neighbours.shape[1]:
            raise ValueError("Merging needs statistics measured with `neighbours`; these have none.")
    pairs, together = _duplicates(sae, threshold, statistics)
    pairs, together = _matching(pairs, together, sae.config.num_latents if most is None else most)
    if statistics is not None:  # the one that contributes more stays
        swap = statistics.contribution[pairs[:, 1]] > statistics.contribution[pairs[:, 0]]
        pairs = torch.where(swap[:, None], pairs.flip(1), pairs)
    merged = copy.deepcopy(sae)
    _write_merged(merged, pairs, together, statistics)
    kept = torch.ones(sae.config.num_latents, dtype=torch.bool)
    kept[pairs[:, 1]] = False
    kept_statistics = None if statistics is None else _joined(statistics, pairs, together).select(kept.nonzero()[:, 0])
    return Merged(_without(merged, kept), pairs, kept_statistics)


def _duplicates(sae: SAEModel, threshold: float, statistics: LatentStatistics | None) -> tuple[Tensor, Tensor]:
    """Return pairs `(n, 2)`, lower place first and most similar pair first, and which of them fire together."""
    neighbours = nearest_latents(sae, _NEIGHBOURS) if statistics is None else statistics.neighbours
    left = torch.arange(len(neighbours)).repeat_interleave(neighbours.shape[1])
    right = neighbours.flatten()
    cosine = _cosine(sae.W_dec, left, right)
    groups = torch.bucketize(torch.arange(len(neighbours)), torch.tensor(sae.prefix_widths), right=True)
    alike = (right >= 0) & (cosine > threshold) & (groups[left] == groups[right])
    if statistics is None:
        together = _cosine(sae.W_enc, left, right) > threshold
        alike &= together
    else:
        both, often = statistics.cofiring.flatten(), statistics.frequency
        together = (both > 0) & (both >= _TOGETHER * torch.maximum(often[left], often[right]))
        alike &= together | (both <= _EXCLUSIVE * torch.minimum(often[left], often[right]))
    pairs = torch.stack([torch.minimum(left, right), torch.maximum(left, right)], dim=1)[alike]
    order = cosine[alike].sort(descending=True, stable=True).indices
    return pairs[order], together[alike][order]


def _cosine(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    rows = rows.detach().float().cpu()
    rows = rows / row_norms(rows)[:, None]
    parts = zip(left.split(2**16), right.split(2**16), strict=True)
    return torch.cat([(rows[i] * rows[j]).sum(1) for i, j in parts])


def _matching(pairs: Tensor, together: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the first pairs that share no latent."""
    used, numbers = set(), []
    for number, (i, j) in enumerate(pairs.tolist()):
        if len(numbers) < most and i not in used and j not in used:
            used |= {i, j}
            numbers.append(number)
    return pairs[numbers], together[numbers]


@torch.no_grad()
def _write_merged(sae: SAEModel, pairs: Tensor, together: Tensor, statistics: LatentStatistics | None) -> None:
    """Put each pair's merged latent in the place of the pair's first (in place)."""
    device = sae.W_dec.device
    pairs, together = pairs.to(device), together.to(device)
    rows = sae.W_dec.double()
    norms = row_norms(rows)[pairs]
    units = rows[pairs] / norms[:, :, None]
    energy = norms.square() if statistics is None else statistics.contribution.to(device)[pairs]
    energy = energy + torch.finfo(torch.float64).tiny  # two silent latents have equal shares
    share = energy / energy.sum(1, keepdim=True)
    unit = torch.nn.functional.normalize((share[:, :, None] * units).sum(1), dim=1)
    norm = (share * norms).sum(1)
    part = (units * unit[:, None]).sum(2) * torch.where(together[:, None], 1.0, share)
    in_latents = part * norms / norm[:, None]  # of pre-activations before any scaling by the norm

    def combine(tensor: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("np,np...->n...", weights, tensor.double()[pairs]).to(tensor)

    first = pairs[:, 0]
    sae.W_enc[first] = combine(sae.W_enc, in_latents)
    sae.b_enc[first] = combine(sae.b_enc, in_latents)
    if hasattr(sae, "threshold"):
        sae.threshold[first] = combine(sae.threshold, part if sae.config.scale_by_decoder_norm else in_latents)
    if hasattr(sae, "b_mag"):
        sae.b_mag[first] = combine(sae.b_mag, in_latents)
        sae.r_mag[first] = combine(sae.r_mag.double().exp(), share).log().to(sae.r_mag)
    sae.W_dec[first] = (unit * norm[:, None]).to(sae.W_dec)


def _joined(statistics: LatentStatistics, pairs: Tensor, together: Tensor) -> LatentStatistics:
    """Return statistics in which the first latent of each pair has the sums of both."""
    first, second = pairs.unbind(1)
    tensors = {name: tensor.clone() for name, tensor in statistics.tensors().items()}
    for name in tensors.keys() - {"latent_ids", "neighbours", "cofiring"}:
        tensors[name][first] += tensors[name][second]
    rarer = torch.minimum(statistics.frequency[first], statistics.frequency[second])
    tensors["frequency"][first] -= torch.where(together, rarer, 0)
    for name in ("mean_square", "contribution"):  # latents that fire together add up before they are squared
        energy = getattr(statistics, name)
        tensors[name][first] += torch.where(together, 2 * (energy[first] * energy[second]).sqrt(), 0)
    return LatentStatistics(statistics.tokens, **tensors)


def _without(sae: SAEModel, kept: Tensor) -> SAEModel:
    """Return the SAE with the latents that are `kept`; each prefix has those of its own."""
    places = kept.nonzero()[:, 0]
    order = torch.cat([places, (~kept).nonzero()[:, 0]])
    sae.permute_(order.to(sae.W_dec.device))
    smaller = sae.truncate(len(places))
    if hasattr(sae.config, "prefix_widths"):
        smaller.config.prefix_widths = [int(kept[:width].sum()) for width in sae.prefix_widths]
        smaller.config.prefix_weights = sae.config.prefix_weights
    return smaller
