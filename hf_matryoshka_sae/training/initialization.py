"""How a dictionary starts, and how raw hidden states become what it is trained on."""

import math

import torch
from torch import Tensor

from ..activations import ActivationStatistics
from ..models import SAEModel
from .config import SAESpec


def input_scaling(spec: SAESpec, statistics: ActivationStatistics, sample: Tensor) -> tuple[Tensor, float]:
    """The mean and the scale with which `x' = (x - mean) / scale` is formed; folded into the weights at the end.

    Args:
        spec ([`SAESpec`]): Its `input_scaling` is read.
        statistics ([`ActivationStatistics`]): Of the hookpoint.
        sample (`Tensor` of shape `(N, D)`): Some of its hidden states, for the mean norm.

    Returns:
        The mean `(D,)` and the scale.
    """
    mean = statistics.mean.float()
    zero = torch.zeros_like(mean)
    square_norm = statistics.scale**2 * len(mean) + mean.double().square().sum().item()
    norms = sample[sample.isfinite().all(-1)].norm(dim=1)
    return {
        "center": (mean, statistics.scale * math.sqrt(len(mean))),
        "rms": (zero, math.sqrt(square_norm)),
        "norm": (zero, norms.mean().item() / math.sqrt(len(mean))),
        "none": (zero, 1.0),
    }[spec.input_scaling]


@torch.no_grad()
def initialize(sae: SAEModel, spec: SAESpec, sample: Tensor, mean: Tensor, seed: int) -> None:
    """Give a new SAE its first weights; equal in every process.

    Args:
        sae ([`SAEModel`]): Changed in place.
        spec ([`SAESpec`]): Its `encoder_init`, `decoder_init_norm` and `b_dec_init` are read.
        sample (`Tensor` of shape `(N, D)`): Normalised hidden states.
        mean (`Tensor` of shape `(D,)`): Mean of the normalised hidden states.
        seed (`int`): Of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(sae.W_dec.shape, generator=generator).to(sae.W_dec)
    units = directions / directions.norm(dim=1, keepdim=True)
    sae.W_dec.copy_(units * spec.decoder_init_norm)
    if spec.encoder_init == "normal":
        sae.W_enc.copy_(directions / math.sqrt(sae.config.d_in) * spec.encoder_init_scale)
    else:
        sae.W_enc.copy_(sae.W_dec * spec.encoder_init_scale)
    sae.b_enc.zero_()
    if spec.b_dec_init == "mean":
        sae.b_dec.copy_(mean)
    elif spec.b_dec_init == "geometric_median":
        sae.b_dec.copy_(geometric_median(sample[:32768]))
    else:
        sae.b_dec.zero_()


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to `points`, by Weiszfeld's iteration in float64.

    Distances are kept above a small floor: at a data point the plain iteration divides by zero.

    Args:
        points (`Tensor` of shape `(N, D)`): Rows; those that are not finite are left out.

    Returns:
        `Tensor` of shape `(D,)` in the type of `points`.
    """
    rows = points.double()
    rows = rows[rows.isfinite().all(-1)]
    guess = rows.mean(0)
    floor = 1e-9 * (rows - guess).norm(dim=1).mean().clamp(min=1e-300)
    for _ in range(iterations):
        weights = 1 / (rows - guess).norm(dim=1).clamp(min=floor)
        following = (weights[:, None] * rows).sum(0) / weights.sum()
        moved = (following - guess).norm()
        guess = following
        if moved <= tolerance * guess.norm():
            break
    return guess.to(points)
