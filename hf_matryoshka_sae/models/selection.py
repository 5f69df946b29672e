"""Which (token, latent) pairs take part, found without holding or sorting all N x F pre-activations.

The encoder runs in blocks of latents. Of each block only what can still win is looked at: in groups of 32 neighbouring
latents, the maximum of each group bounds the cut from below (a group that holds one of the `count` largest entries is
among the `count` groups of largest maximum), so one cheap reduction leaves few candidates, on which the cut is exact.

Where bf16 products are fast, they say which pairs can win (`screening.py`, in groups of 64), and float32 dot products
of these alone decide.

Of equal entries the first wins, in the order of (token, latent); so does the group that comes first. That makes every
selection independent of the size of the blocks and of the number of processes; across backends it is equal where their
products are, bit for bit.

Two ways, same results: where the host may look at the data (CPU), candidates are compressed to a list; on an
accelerator every shape is known in advance (`static`), so that the host never waits.

Shapes: N tokens, D `d_in`, F latents, B latents in a block, G groups, M pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuts import Selection, cut_fixed, cut_list, fixed_candidates, listed_candidates, lower_bound
from .encoder_blocks import GROUP, EncoderBlocks
from .screening import above, count_fallback, counts, screened, screens
from .sharding import Layout, cut_of_batch, cut_of_rows


# Screening gives up where less than this share of the tokens has a floor above 0, where candidates are this many times
# the places, where more than this share of a block is above its threshold.
_DECIDED, _CROWDED, _DENSE = 0.75, 4, 1 / 32


def _host_may_look(device: torch.device) -> bool:
    """Whether sizes may depend on the data: the host would wait for an accelerator to tell."""
    return device.type == "cpu"


def with_nan_rows(chosen: Selection, x: Tensor) -> Selection:
    """A selection in which each row of `x` `(N, D)` that is not finite has one pair: NaN at latent 0.

    Such a row is above no threshold and would decode to the bias, as if nothing were wrong. So it decodes to NaN, in
    every prefix.
    """
    broken = ~torch.linalg.vector_norm(x, torch.inf, dim=1).isfinite()  # one pass without a copy
    if not broken.any():
        return chosen
    kept, rows = ~broken[chosen[0]], broken.nonzero().squeeze(1)
    nan = chosen[2].new_full((len(rows),), torch.nan)
    return _joined([tuple(part[kept] for part in chosen), (rows, torch.zeros_like(rows), nan)])


def select_above(blocks: EncoderBlocks, threshold: Tensor | float) -> Selection:
    """Select the pairs strictly above a threshold.

    How many there are is known to the data alone: the host waits for each block.

    Args:
        blocks ([`EncoderBlocks`]): The pre-activations.
        threshold (`float` or `Tensor` of shape `(F,)`): One for all latents, or one for each.

    Returns:
        Tokens, latents and pre-activations, `(M,)` each, sorted by token, then by latent.
    """
    if not screens(blocks):
        return _above(blocks, threshold)
    parts = []
    for block in screened(blocks, threshold):
        counts.tokens += blocks.num_rows
        if block.share_reaching() > _DENSE:
            count_fallback(blocks.num_rows)
            of_block = threshold[block.start : block.stop] if isinstance(threshold, Tensor) else threshold
            rows, cols, values = _above(blocks.latents(block.start, block.stop), of_block)
            parts.append((rows, cols + block.start, values))
            continue
        rows, cols = block.reaching(block.group_maxima())
        values = blocks.exact(rows, cols)
        limit = threshold.detach()[cols] if isinstance(threshold, Tensor) else threshold
        won = (values > limit).nonzero().squeeze(1)
        parts.append((rows[won], cols[won], values[won]))
        counts.candidates += len(rows)
        counts.pairs += len(parts[-1][0])
    return _joined(parts)


def _above(blocks: EncoderBlocks, threshold: Tensor | float) -> Selection:
    """Select the pairs above a threshold from float32 products."""
    pairs, mask = [], None
    for start, block in blocks:
        limit = threshold
        if isinstance(threshold, Tensor):
            limit = threshold.detach()[start : start + block.shape[1]]
            limit = F.pad(limit, (0, block.shape[1] - len(limit)))
        # One mask for all blocks: the small results that stay would lie between masks that come and go, and malloc
        # could not use their places again.
        mask = block.new_empty(block.numel(), dtype=torch.bool) if mask is None else mask
        above = torch.gt(block, limit, out=mask[: block.numel()].view_as(block))
        rows, cols = above.nonzero(as_tuple=True)
        pairs.append((rows, cols + start, block[rows, cols]))
    return _joined(pairs)


def select_topk(
    blocks: EncoderBlocks,
    k: int,
    static: bool | None = None,
    layout: Layout | None = None,
    capacity_factor: float | None = None,
) -> Selection:
    """The `k` largest entries of each row, positive or not; of equal ones the lowest latent wins.

    Source: Gao et al. 2024 (arXiv 2406.04093), eq. 3; its ReLU is left to the caller.

    Args:
        blocks ([`EncoderBlocks`]): The pre-activations.
        k (`int`): Latents kept per token (all where there are fewer).
        static (`bool`, *optional*): Never let the host wait for the device; by default everywhere but on a CPU.
        layout ([`Layout`], *optional*): With shards, the largest of all shards are meant; each gets those of its own
            latents. How many these are only the data knows, so the host waits.
        capacity_factor (`float`, *optional*): Other than the layout's.

    Returns:
        Tokens, latents and pre-activations, `(N k,)` each without shards, sorted by token, then by latent.
    """
    own = min(int(k), blocks.num_latents)
    chosen = _select_largest(blocks, own, per_row=True, static=static)
    if layout is None or layout.shards == 1:
        return chosen
    values = chosen[2].view(blocks.num_rows, own)
    kept = cut_of_rows(values, int(k), layout, capacity_factor).flatten().nonzero().squeeze(1)
    return tuple(part[kept] for part in chosen)


def select_group_max(blocks: EncoderBlocks, groups: Tensor) -> Selection:
    """The largest entry of each group of latents in each row, positive or not; of equal ones the lowest latent wins.

    Args:
        blocks ([`EncoderBlocks`]): The pre-activations.
        groups (`Tensor` of shape `(F,)`): Group of each latent.

    Returns:
        Tokens, latents and pre-activations, `(N G,)` each for the G groups there are, sorted by token, then by latent.
    """
    number = groups.unique(return_inverse=True)[1]  # groups of which pruning left nothing have no place
    shape = (blocks.num_rows, int(number.max()) + 1 if len(number) else 0)
    best = torch.full(shape, -torch.inf, dtype=blocks.dtype, device=blocks.device)
    winner = torch.zeros(shape, dtype=torch.int64, device=blocks.device)
    for start, block in blocks:
        inside = number[start : start + block.shape[1]]
        entries, bags = block[:, : len(inside)], inside.expand(len(block), -1)
        largest = torch.full_like(best, -torch.inf).scatter_reduce_(1, bags, entries, "amax")
        latents = torch.arange(start, start + len(inside), device=blocks.device)
        reaching = torch.where(entries == largest[:, inside], latents, blocks.num_latents)
        first = torch.full_like(winner, blocks.num_latents).scatter_reduce_(1, bags, reaching, "amin")
        better = largest > best
        best, winner = torch.where(better, largest, best), torch.where(better, first, winner)
    cols, order = winner.sort(dim=1)
    rows = torch.arange(shape[0], device=blocks.device)[:, None].expand(shape)
    return rows.flatten(), cols.flatten(), best.gather(1, order).flatten()


def select_batch_topk(
    blocks: EncoderBlocks, k: float, layout: Layout | None = None, static: bool | None = None
) -> Selection:
    """The `int(k N)` largest entries of the whole batch, positive or not (Bussmann et al. 2024, arXiv 2412.06410).

    Of equal entries the lowest (token, latent) wins. With `layout` the batch is the joined batch of its replicas, and
    the latents are those of all its shards.

    Args:
        blocks ([`EncoderBlocks`]): The pre-activations; every process holds as many rows.
        k (`float`): Latents kept per token on average.
        layout ([`Layout`], *optional*): Processes that share one batch. How many pairs fall to a process is known only
            after the cut: the host waits once, and entries that are not positive are left out.
        static (`bool`, *optional*): As for [`select_topk`].

    Returns:
        Tokens, latents and pre-activations, `(int(k N),)` each in one process.
    """
    size = blocks.num_rows * blocks.num_latents
    if layout is None or layout.processes == 1:
        return _select_largest(blocks, min(int(k * blocks.num_rows), size), per_row=False, static=static)
    tokens = blocks.num_rows * layout.replicas
    count = min(int(k * tokens), layout.num_latents * tokens)
    if count == 0:
        return _select_largest(blocks, 0, per_row=False, static=static)
    layout.selections += 1
    capacity, kept = layout.capacity(count, layout.processes), None
    while kept is None:
        chosen = _select_largest(blocks, min(capacity, size), per_row=False, static=static)
        kept = cut_of_batch(chosen[2], chosen[0], count, capacity, layout)
        if kept is None:
            capacity = count
            layout.fallbacks += 1
    pairs = kept.nonzero().squeeze(1)
    return tuple(part[pairs] for part in chosen)


def _select_largest(blocks: EncoderBlocks, count: int, per_row: bool, static: bool | None) -> Selection:
    """The largest `count` of each row or of all, over all blocks: the best so far against each next block."""
    if blocks.num_rows == 0 or count == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=blocks.device)
        return nothing, nothing, torch.empty(0, dtype=blocks.dtype, device=blocks.device)
    static = not _host_may_look(blocks.device) if static is None else static
    bags = blocks.num_rows if per_row else 1
    if screens(blocks):
        counts.tokens += blocks.num_rows
        chosen = _screened_static(blocks, count, bags) if static else _screened_list(blocks, count, bags)
        if chosen is not None:
            return chosen
        count_fallback(blocks.num_rows)
        rows, cols, _ = _largest(blocks, count, bags, static)
        return rows, cols, blocks.exact(rows, cols)
    return _largest(blocks, count, bags, static)


def _largest(blocks: EncoderBlocks, count: int, bags: int, static: bool) -> Selection:
    """Select the largest entries from the products that `blocks` gives."""
    chosen = floor = None
    for start, block in blocks:
        maxima = block.view(blocks.num_rows, -1, GROUP).amax(-1)
        if static:
            rows, cols, values = fixed_candidates(block, maxima, bags, count)
        else:
            if floor is None:
                floor = lower_bound(maxima, lambda block=block: block, bags, count)
            rows, cols, values = listed_candidates(block, maxima, floor)
        pairs = rows, cols + start, values
        pairs = pairs if chosen is None else _joined([chosen, pairs])
        chosen, floor = cut_fixed(pairs, bags, count) if static else cut_list(pairs, bags, count)
    assert chosen is not None
    return chosen


def _screened_list(blocks: EncoderBlocks, count: int, bags: int) -> Selection | None:
    """Select the largest entries by way of bf16 products; `None` where they cannot tell."""
    chosen = floor = decided = None
    for block in screened(blocks):
        maxima = block.group_maxima()
        if floor is None:
            floor = lower_bound(block.lower(maxima), lambda block=block: block.lower(None), bags, count)
            decided = floor > 0  # positive bf16 numbers alone are ordered as their bits; NaN is not above 0
            if decided.sum() < _DECIDED * bags:
                return None
        rows, cols = block.reaching(maxima, torch.where(decided, floor, torch.inf))
        if len(rows) > _CROWDED * count * bags + blocks.num_rows:
            if bags == 1:
                return None
            crowded = torch.bincount(rows, minlength=bags)[:, None] > _CROWDED * count
            decided &= ~crowded
            if decided.sum() < _DECIDED * bags:
                return None
            kept = decided[rows, 0]
            rows, cols = rows[kept], cols[kept]
        counts.candidates += len(rows)
        values = blocks.exact(rows, cols)
        pairs = (rows, cols, values) if chosen is None else _joined([chosen, (rows, cols, values)])
        chosen, floor = cut_list(pairs, bags, count)
    undecided = (~decided).flatten().nonzero().squeeze(1)
    if len(undecided):
        count_fallback(len(undecided))
        rows, cols, _ = _largest(blocks.rows(undecided), count, len(undecided), static=False)
        kept, rows = decided[chosen[0], 0], undecided[rows]
        chosen = _joined([tuple(part[kept] for part in chosen), (rows, cols, blocks.exact(rows, cols))])
    counts.pairs += len(chosen[0])
    return chosen


def _screened_static(blocks: EncoderBlocks, count: int, bags: int) -> Selection | None:
    """Select the largest by way of bf16 products with shapes known in advance.

    The host waits once, to see whether the selection was certain; `None` where it was not.
    """
    chosen, missed = None, torch.full((bags, 1), -torch.inf, device=blocks.device)
    wanted = 2 * count + 16
    for block in screened(blocks):
        size = block.stop - block.start
        upper = block.upper[:, :size].contiguous()
        if size % GROUP:
            upper = F.pad(upper, (0, -size % GROUP), value=-torch.inf)
        maxima = upper.view(blocks.num_rows, -1, GROUP).amax(-1)
        rows, cols, bound = fixed_candidates(upper, maxima, bags, wanted)
        bound = bound.view(bags, -1).float()
        if bound.shape[1] == wanted:
            missed = torch.maximum(missed, above(bound.amin(1, keepdim=True)))
        cols = (cols + block.start).clamp(max=block.stop - 1)  # of padding none can win
        values = blocks.exact(rows, cols).masked_fill(bound.flatten() == -torch.inf, -torch.inf)
        pairs = (rows, cols, values) if chosen is None else _joined([chosen, (rows, cols, values)])
        chosen, _ = cut_fixed(pairs, bags, count)
    certain = (chosen[2].view(bags, -1).amin(1, keepdim=True) > missed).all()
    return chosen if certain else None


def _joined(parts: list[Selection]) -> Selection:
    """One selection of several, whose latents ascend: a stable sort by token orders them by token, then latent."""
    if len(parts) == 1:
        return parts[0]
    rows, cols, values = map(torch.cat, zip(*parts, strict=True))
    order = rows.argsort(stable=True)
    return rows[order], cols[order], values[order]
