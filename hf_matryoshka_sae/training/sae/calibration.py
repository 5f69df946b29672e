"""The inference threshold of BatchTopK.

A single threshold is solved for on data: the value above which k latents fire per token on average. A running mean of
each batch's smallest kept value, as several libraries use it, depends on the batch size and lets more than k through.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ...models import SAEModel
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
    kept, tokens, fixed = [], 0, 0
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
    device = sae.W_enc.device
    values = torch.cat(kept).sort().values if kept else torch.zeros(0, device=device)
    counts = torch.tensor([tokens, fixed], dtype=torch.int64, device=device)
    total, fixed = all_sum(counts, layout.replica_group).tolist()
    if not total:
        raise ValueError("No finite hidden states to calibrate the threshold on. Raise `calibration_tokens`.")
    threshold = _value_with_count_above(values, k * total - fixed, layout.group)
    sae.threshold[base:].fill_(threshold)
    return threshold


def _value_with_count_above(values: Tensor, wanted: float, group: dist.ProcessGroup | None) -> float:
    """The number that `wanted` of all processes' sorted positive values exceed, by bisection."""
    largest = values[-1:].max().item() if len(values) else 0.0
    if group is not None:
        peak = torch.tensor(largest, device=values.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        largest = peak.item()
    low, high = 0.0, largest
    for _ in range(60):
        middle = (low + high) / 2
        above = len(values) - torch.searchsorted(values, values.new_tensor(middle), right=True)
        if int(all_sum(above.to(values.device), group)) > wanted:
            low = middle
        else:
            high = middle
    return high
