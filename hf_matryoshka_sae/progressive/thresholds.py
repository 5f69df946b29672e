"""Thresholds for a target L0 at each prefix.

A threshold decides each latent on its own, so that pre-activations of the widest SAE give how often every prefix would
fire at any threshold: one pass over the data calibrates all prefixes.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..common.distributed import reduce_sum
from ..evaluation import activation_batches
from ..evaluation.data import HasActivations
from ..models import SAEModel
from ..models.encoder_blocks import EncoderBlocks
from ..models.selection import select_above


# Values are counted in bins of 1/512 octave (0.14% of the value) between these powers of two, whatever their unit.
_BINS_PER_OCTAVE, _LOWEST, _HIGHEST = 512, -40, 24
_BINS = _BINS_PER_OCTAVE * (_HIGHEST - _LOWEST)
_ENTRIES = 2**24  # pre-activations in a block


@torch.no_grad()
def calibrate_thresholds(
    sae: SAEModel,
    activations: HasActivations | Iterable[Tensor],
    target_l0: float | Sequence[float],
    widths: Sequence[int] | None = None,
) -> dict[int, float]:
    """Return the threshold at which each prefix fires a target number of latents per token.

    Args:
        sae ([`SAEModel`]): An SAE of family `batch_topk`, Matryoshka or not. JumpReLU's thresholds are learnt one by
            one, and ReLU, TopK and Gated have none.
        activations (iterable of `(n, D)` tensors, or a [`HeldOut`]): Raw hidden states.
        target_l0 (`float` or `Sequence[float]`): Latents per token. A number: those of every prefix taken alone; the
            SAE stays as it is, and [`with_threshold`] returns the prefix with its threshold. A list, one number for
            each width, not decreasing: those of the widest SAE below each width; its thresholds are set, one for each
            group of latents between two widths.
        widths (`Sequence[int]`, *optional*): Widths to calibrate; by default the SAE's prefix widths.

    Returns:
        `dict[int, float]`: The threshold of each width; of its outermost group, where `target_l0` is a list.

    Raises:
        `ValueError`: for another family, targets that do not fit, or no hidden states.
    """
    if sae.config.activation_name != "batch_topk":
        raise ValueError(
            f"`calibrate_thresholds` needs an SAE whose latents fire above a calibrated threshold (batch_topk), got "
            f"{sae.config.activation_name}."
        )
    if sae.config.refine_steps:
        raise ValueError("`calibrate_thresholds` reads what an encoder says at first. Calibrate, then `refined(sae)`.")
    widths = sorted(set(sae.prefix_widths if widths is None else widths))
    if not widths or widths[0] < 1 or widths[-1] > sae.config.num_latents:
        raise ValueError(f"`widths` must lie between 1 and {sae.config.num_latents}, got {widths}.")
    nested = not isinstance(target_l0, (int, float))
    targets = list(target_l0) if nested else [target_l0] * len(widths)
    if len(targets) != len(widths) or min(targets) <= 0 or sorted(targets) != targets:
        raise ValueError(f"`target_l0` needs a positive number for each of {widths}, not decreasing; got {target_l0}.")
    counts, tokens = _histograms(sae, activations, widths)
    if nested:
        targets = [after - before for before, after in zip([0.0, *targets[:-1]], targets, strict=True)]
    else:
        counts = counts.cumsum(0)
    thresholds = [_threshold(count, target * tokens) for count, target in zip(counts, targets, strict=True)]
    if nested:
        for start, stop, threshold in zip([0, *widths[:-1]], widths, thresholds, strict=True):
            sae.threshold[start:stop] = threshold
    return dict(zip(widths, thresholds, strict=True))


def with_threshold(sae: SAEModel, width: int, threshold: float) -> SAEModel:
    """Return the first `width` latents as an SAE that fires above `threshold`."""
    smaller = sae.truncate(width).eval()
    smaller.threshold.fill_(threshold)
    return smaller


def _edges() -> Tensor:
    """Return the lower edges of the bins."""
    return torch.exp2(torch.arange(_BINS, dtype=torch.float64) / _BINS_PER_OCTAVE + _LOWEST)


def _histograms(
    sae: SAEModel, activations: HasActivations | Iterable[Tensor], widths: Sequence[int]
) -> tuple[Tensor, int]:
    """Return counts of positive pre-activations by group and bin, `(groups, bins)`, and the number of tokens."""
    counts = torch.zeros(len(widths), _BINS, dtype=torch.int64)
    tokens = torch.zeros((), dtype=torch.int64)
    edges = _edges().to(sae.W_enc.device)
    limits = torch.tensor(widths[:-1], device=sae.W_enc.device)
    width = widths[-1]
    b_dec = sae.b_dec if sae.config.apply_b_dec_to_input else None
    scale = sae.W_dec[:width].norm(dim=1) if sae.config.scale_by_decoder_norm else None
    for batch in activation_batches(activations):
        if batch.shape[-1] != sae.config.d_in or not batch.isfinite().all():
            raise ValueError(
                f"Hidden states must be finite and of width d_in = {sae.config.d_in}, got {tuple(batch.shape)}."
            )
        tokens += len(batch)
        for x in batch.to(sae.W_enc).split(max(1, _ENTRIES // width)):
            encoder = sae.W_enc[:width], sae.b_enc[:width]
            blocks = EncoderBlocks(sae.normalized(x)[0], *encoder, b_dec, scale, screening=sae.config.screening)
            _, cols, values = select_above(blocks, float(edges[0]))
            groups = torch.bucketize(cols, limits, right=True)
            bins = torch.searchsorted(edges, values.double(), right=True) - 1
            counts += torch.bincount(groups * _BINS + bins, minlength=counts.numel()).view_as(counts).cpu()
    reduce_sum(counts, tokens)
    if not tokens:
        raise ValueError("There are no hidden states to calibrate thresholds on.")
    return counts, int(tokens)


def _threshold(counts: Tensor, target: float) -> float:
    """Return the value that `target` entries exceed, interpolated between two edges; 0 where there are fewer."""
    above = counts.double().flip(0).cumsum(0).flip(0)  # entries at or above each edge
    if above[0] <= target:
        return 0.0
    edges = _edges()
    last = int((above > target).sum()) - 1  # the bin of the target's entry
    upper = edges[last + 1] if last + 1 < _BINS else edges[last]
    share = (above[last] - target) / counts[last]
    return float(edges[last] + share * (upper - edges[last]))
