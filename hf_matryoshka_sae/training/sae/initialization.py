"""How a dictionary starts, and how raw hidden states become what it is trained on."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...activations import ActivationStatistics
from ...common.seeds import derived_seed
from ...models import SAEModel
from ...models.sharding import Layout
from ..config.spec import SAESpec


_BLOCK_ENTRIES = 2**26  # drawn at once
_PROBES = 2048  # tokens, and directions, whose products the first threshold is a quantile of
_RELATIVE_BANDWIDTH = 0.5  # of JumpReLU's kernel, in units of the first threshold


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
def initialize(
    sae: SAEModel, spec: SAESpec, sample: Tensor, mean: Tensor, seed: int, layout: Layout | None = None
) -> None:
    """Give a new SAE its first weights; equal in every process.

    Args:
        sae ([`SAEModel`]): Changed in place.
        spec ([`SAESpec`]): Its `encoder_init`, `decoder_init_norm` and `b_dec_init` are read.
        sample (`Tensor` of shape `(N, D)`): Normalised hidden states.
        mean (`Tensor` of shape `(D,)`): Mean of the normalised hidden states.
        seed (`int`): Of the random directions.
        layout ([`Layout`], *optional*): Of a sharded dictionary, of which `sae` holds the latents of this process.
    """
    layout = layout or Layout(sae.config.num_latents)
    for rows, directions in _directions(layout, sae.config.d_in, seed):
        directions = directions.to(sae.W_dec)
        sae.W_dec[rows] = directions / directions.norm(dim=1, keepdim=True) * spec.decoder_init_norm
        if spec.encoder_init == "normal":
            sae.W_enc[rows] = directions / math.sqrt(sae.config.d_in) * spec.encoder_init_scale
        else:
            sae.W_enc[rows] = sae.W_dec[rows] * spec.encoder_init_scale
    sae.latent_ids.copy_(torch.arange(*layout.rows))
    sae.b_enc.zero_()
    if spec.b_dec_init == "mean":
        sae.b_dec.copy_(mean)
    elif spec.b_dec_init == "geometric_median":
        sae.b_dec.copy_(geometric_median(sample[:32768]))
    else:
        sae.b_dec.zero_()


@torch.no_grad()
def start_at_target(
    sae: SAEModel, spec: SAESpec, sample: Tensor, seed: int, layout: Layout | None = None
) -> float | None:
    """Give all latents of a new SAE the threshold at which `target_l0` of them fire per token; equal in every process.

    A ReLU or Gated SAE has it in `b_enc`. Without it half of the latents fire at first: the first steps undo what they
    add up to, and many latents never fire again.

    Args:
        sae ([`SAEModel`]): Initialised; changed in place.
        spec ([`SAESpec`]): Its `start_at_target`, `target_l0`, `initial_threshold`, `bandwidth` and how the encoder
            begins are read.
        sample (`Tensor` of shape `(N, D)`): Normalised hidden states.
        seed (`int`): Of the random directions that stand for the latents.
        layout ([`Layout`], *optional*): Of a sharded dictionary.

    Returns:
        `float`: The threshold, in normalised units; `None` where the spec wants none.
    """
    if not spec.starts_at_target:
        return None
    threshold = spec.initial_threshold
    if threshold is None:
        num_latents = sae.config.num_latents if layout is None else layout.num_latents
        threshold = _threshold_of(spec.target_l0 / num_latents, sae, spec, sample, seed)
    if sae.config.activation_name == "jumprelu":
        sae.threshold.fill_(threshold)
        sae.config.initial_threshold = threshold
        if spec.bandwidth is None:
            sae.config.bandwidth = _RELATIVE_BANDWIDTH * threshold
    else:
        sae.b_enc.fill_(-threshold)
        if sae.config.activation_name == "gated":  # as ReLU begins: whole magnitudes add up to far more than x
            sae.b_mag.fill_(-threshold)
    return threshold


def _threshold_of(share: float, sae: SAEModel, spec: SAESpec, sample: Tensor, seed: int) -> float:
    """The number that this share of first pre-activations exceeds: a quantile over tokens and random directions."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "first threshold"))
    directions = torch.randn(_PROBES, sae.config.d_in, generator=generator).to(sample)
    norm = spec.encoder_init_scale * (spec.decoder_init_norm if spec.encoder_init == "decoder" else 1.0)
    directions *= norm / directions.norm(dim=1, keepdim=True)
    rows = sample[sample.isfinite().all(1)][:_PROBES]
    rows = rows - sae.b_dec.to(rows) if sae.config.apply_b_dec_to_input else rows
    values = (rows @ directions.T).flatten()
    above = min(len(values) - 1, max(1, round(share * len(values))))
    threshold = max(values.kthvalue(len(values) - above).values.item(), torch.finfo(torch.float32).tiny)
    return float(f"{threshold:.5g}")  # any number of processes, whose sums round otherwise, begins with the same


def _directions(layout: Layout, d_in: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """Normal numbers for the rows of this process, block by block: which rows, and theirs.

    Blocks are those of the whole dictionary, each with a seed of its own, so that a shard draws what one process
    would, and hardly more than it keeps.
    """
    start, stop = layout.rows
    size = max(1, _BLOCK_ENTRIES // d_in)
    for number, first in enumerate(range(0, layout.num_latents, size)):
        last = min(first + size, layout.num_latents)
        if first < stop and last > start:
            own = seed if number == 0 else derived_seed(seed, f"directions {number}")
            block = torch.randn(last - first, d_in, generator=torch.Generator().manual_seed(own))
            low, high = max(first, start), min(last, stop)
            yield slice(low - start, high - start), block[low - first : high - first]


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to `points`, by Weiszfeld's iteration in float64.

    Distances are kept above a small floor: at a data point the plain iteration divides by zero.

    Args:
        points (`Tensor` of shape `(N, D)`): Rows; those that are not finite are left out.
        iterations (`int`, *optional*, defaults to 100): Most steps of the iteration.
        tolerance (`float`, *optional*, defaults to 1e-6): The iteration ends at a step of this share of the length.

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
