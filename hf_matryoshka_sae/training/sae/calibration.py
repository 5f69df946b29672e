"""Thresholds that are solved for on data, so that as many latents fire per token as was asked for.

BatchTopK gets its inference threshold: the value above which k latents fire. A running mean of each batch's smallest
kept value, as several libraries use it, depends on the batch size and lets more than k through. ReLU, JumpReLU and
Gated have learnt theirs, and training has brought them close to the target: all of them move by one small amount.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ...models import SAEModel
from ...models.encoder_blocks import EncoderBlocks
from ...models.selection import select_above, select_batch_topk
from ...models.sharding import Layout, all_sum
from .growth import BatchTopKOnBase


# More values than this per token cannot be above a sensible threshold; keeps memory at a few k per token.
_MARGIN = 1.5


@torch.no_grad()
def calibrate_threshold(sae: SAEModel, batches: Iterable[Tensor], k: float, layout: Layout | None = None) -> float:
    """Set `sae.threshold` so that `k` latents of the full width fire per token, and return it.

    Every prefix gets the same threshold, so that restricting to a prefix equals masking. A frozen base keeps its own;
    the latents past it get the one with which base and new latents together are `k`.

    Args:
        sae ([`SAEModel`]): With `activation_name` `"batch_topk"`; in the units of `batches`.
        batches (`Iterable[Tensor]`): `(N, D)` hidden states, at least a few batches; rows that are not finite are
            left out.
        k (`float`): Latents per token to aim at.
        layout ([`Layout`], *optional*): Processes that share the calibration, or the dictionary.

    Raises:
        `ValueError`: if there is no finite hidden state.
    """
    base = sae.family.width if isinstance(sae.family, BatchTopKOnBase) else 0
    kept, tokens, fixed = [sae.b_enc.new_zeros(0)], 0, 0
    layout = layout or Layout(sae.config.num_latents)
    training, sae.k = sae.training, min(_MARGIN * k, layout.num_latents)
    sae.train()
    try:
        for x in batches:
            finite = x.isfinite().all(-1)
            x = torch.where(finite[:, None], x, 0.0).to(sae.W_enc)  # all processes keep as many rows
            pairs = sae.encode_pairs(x, layout=layout)
            usable, outer = finite[pairs.rows], pairs.cols >= base
            kept.append(pairs.values[usable & outer])
            fixed += int((usable & ~outer).sum())
            tokens += int(finite.sum())
    finally:
        sae.train(training)
        sae.k = k
    threshold = _solved(kept, tokens, fixed, k, layout, lowest=0.0)
    sae.threshold[base:].fill_(threshold)
    return threshold


@torch.no_grad()
def calibrate_l0(
    sae: SAEModel, batches: Iterable[Tensor], target_l0: float, layout: Layout | None = None, base: int = 0
) -> float:
    """Move the thresholds of all latents by one amount so that `target_l0` of them fire per token, and return it.

    These are JumpReLU's `threshold`, and `-b_enc` of ReLU, whose values move with it, and of Gated, whose magnitudes
    do not know it. Latents keep the differences that they have learnt, in every prefix.

    Args:
        sae ([`SAEModel`]): Of `activation_name` `"relu"`, `"jumprelu"` or `"gated"`, with unit decoder rows or without
            `scale_by_decoder_norm`; in the units of `batches`.
        batches (`Iterable[Tensor]`): As in [`calibrate_threshold`], but no iterator: they are read again where some
            hold far more of the pairs than others.
        target_l0 (`float`): Latents per token to aim at.
        layout ([`Layout`], *optional*): As in [`calibrate_threshold`].
        base (`int`, *optional*, defaults to 0): The first so many latents keep their thresholds.

    Raises:
        `ValueError`: if there is no finite hidden state.
    """
    layout, share = layout or Layout(sae.config.num_latents), _MARGIN
    while True:
        kept, floor, tokens, fixed = _margins(sae, batches, share * target_l0, base)
        shift = _solved(kept, tokens, fixed, target_l0, layout)
        if layout.group is not None:
            dist.all_reduce(floor, dist.ReduceOp.MAX, group=layout.group)
        # Above the floor of every batch nothing was left out.
        if shift >= floor.item() or share * target_l0 >= layout.num_latents:
            break
        share *= 2
    if sae.config.activation_name == "jumprelu":
        sae.threshold[base:] = (sae.threshold[base:] + shift).clamp(min=0)
    else:
        sae.b_enc[base:] -= shift
    return shift


def _margins(
    sae: SAEModel, batches: Iterable[Tensor], per_token: float, base: int
) -> tuple[list[Tensor], Tensor, int, int]:
    """How far pairs are above their latents' thresholds: the `per_token` largest of each batch.

    Returns:
        The margins of each batch; the largest number below which a batch has pairs that are left out; tokens; pairs of
        the first `base` latents that fire.
    """
    kept, tokens, fixed = [sae.b_enc.new_zeros(0)], 0, 0
    floor = sae.b_enc.new_full((), -torch.inf)
    learnt = sae.threshold if sae.config.activation_name == "jumprelu" else torch.zeros_like(sae.b_enc)
    b_dec = sae.b_dec if sae.config.apply_b_dec_to_input else None
    for x in batches:
        x = x[x.isfinite().all(-1)].to(sae.W_enc)
        blocks = EncoderBlocks(x, sae.W_enc, sae.b_enc - learnt.to(sae.b_enc), b_dec)
        if base:
            _, cols, margins = select_above(blocks.latents(0, base), 0.0)
            fixed += len(_with_magnitude(sae, cols, margins))
        outer = blocks.latents(base, None)
        _, cols, margins = select_batch_topk(outer, per_token)
        if 0 < len(margins) < outer.num_rows * outer.num_latents:
            floor = torch.maximum(floor, margins.min().to(floor))
        kept.append(_with_magnitude(sae, cols + base, margins))
        tokens += len(x)
    return kept, floor, tokens, fixed


def _with_magnitude(sae: SAEModel, cols: Tensor, margins: Tensor) -> Tensor:
    """The margins of pairs that fire where their gate is open: a Gated SAE's magnitude may be 0 even then."""
    if sae.config.activation_name != "gated":
        return margins
    return margins[sae.family.values(sae, margins, cols)[0] > 0]


def _solved(
    kept: list[Tensor], tokens: int, fixed: int, wanted: float, layout: Layout, lowest: float | None = None
) -> float:
    """The number that `wanted` of all processes' values per token exceed, those counted that exceed any.

    Args:
        kept (`list[Tensor]`): The largest values of each batch of this process.
        tokens (`int`): Of this process.
        fixed (`int`): Pairs of this process that fire whatever the number.
        wanted (`float`): Values per token.
        layout ([`Layout`]): The processes.
        lowest (`float`, *optional*): Least result; by default the least value.
    """
    values = torch.cat(kept).sort().values
    total, fixed = all_sum(torch.tensor([tokens, fixed], device=values.device), layout.replica_group).tolist()
    if not total:
        raise ValueError("No finite hidden states to calibrate the threshold on. Raise `calibration_tokens`.")
    return _value_with_count_above(values, wanted * total - fixed, layout.group, lowest)


def _value_with_count_above(
    values: Tensor, wanted: float, group: dist.ProcessGroup | None, lowest: float | None
) -> float:
    """The number that `wanted` of all processes' sorted values exceed, by bisection from `lowest` or the least up."""
    ends = torch.stack([values[-1], -values[0]]) if len(values) else values.new_full((2,), -torch.inf)
    if group is not None:
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    high, least = ends[0].item(), -ends[1].item()
    low = least if lowest is None else lowest
    high = max(high, low)
    for _ in range(60):
        middle = (low + high) / 2
        above = len(values) - torch.searchsorted(values, values.new_tensor(middle), right=True)
        if int(all_sum(above.to(values.device), group)) > wanted:
            low = middle
        else:
            high = middle
    return high
