"""Which (token, latent) pairs take part, found without holding or sorting all N x F pre-activations.

The encoder runs in blocks of latents. Of each block only what can still win is looked at: in groups of 32 neighbouring
latents, the maximum of each group bounds the cut from below (a group that holds one of the `count` largest entries is
among the `count` groups of largest maximum), so one cheap reduction leaves few candidates, on which the cut is exact.

Of equal entries the first wins, in the order of (token, latent); so does the group that comes first. That makes every
result independent of the size of the blocks, the backend and the number of processes.

Two ways, same results: where the host may look at the data (CPU), candidates are compressed to a list; on an
accelerator every shape is known in advance (`static`), so that the host never waits.

Shapes: N tokens, D `d_in`, F latents, B latents in a block, G groups, M pairs.
"""

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .sharding import Layout, cut_of_batch, cut_of_rows


_GROUP = 32
_SAMPLE = 2**16
# Entries of one block of pre-activations. Fewer blocks mean fewer candidates that a later block overrules.
_BLOCK_ENTRIES = {"cpu": 2**24, "cuda": 2**29}
# A CPU's block is kept for the next step: malloc hands memory of this size back to the system, and fetching it anew
# costs a fifth of the matmul. (CUDA tensors have torch's own pool.)
_kept = threading.local()

Selection = tuple[Tensor, Tensor, Tensor]


class EncoderBlocks:
    """The pre-activations `((x - b_dec) W_enc^T + b_enc) * scale`, computed a block of latents at a time.

    Iterating gives `(first latent, block)`, latents ascending. A block `(N, B)` is padded with -inf to whole groups
    and is overwritten by the next one. The product is taken in the wider type of the hidden states and the weights,
    under autocast in its type.

    Args:
        x (`Tensor` of shape `(N, D)`): Hidden states.
        W_enc (`Tensor` of shape `(F, D)`), b_enc (`Tensor` of shape `(F,)`): Encoder.
        b_dec (`Tensor` of shape `(D,)`, *optional*): Subtracted from the input.
        scale (`Tensor` of shape `(F,)`, *optional*): Positive factor of each latent.
        block_latents (`int`, *optional*): B; by default what suits the device and N.
    """

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None = None,
        scale: Tensor | None = None,
        block_latents: int | None = None,
    ):
        self.num_rows, self.num_latents, self.device = len(x), len(W_enc), x.device
        fitting = _BLOCK_ENTRIES.get(x.device.type, 2**27) // max(1, len(x))
        self.block_latents = min(_whole_groups(block_latents or max(1, fitting)), _whole_groups(len(W_enc)))
        autocast = torch.is_autocast_enabled(x.device.type)
        wider = torch.promote_types(x.dtype, W_enc.dtype)
        self.dtype = torch.get_autocast_dtype(x.device.type) if autocast else wider
        self._x = (x if b_dec is None else x - b_dec).to(self.dtype)
        self._W_enc, self._b_enc, self._scale = W_enc, b_enc, scale

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        buffer = self._take_buffer()
        for start in range(0, self.num_latents, max(1, self.block_latents)):  # a shard may hold none
            stop = min(start + self.block_latents, self.num_latents)
            rows, biases = (part[start:stop].to(self.dtype) for part in (self._W_enc, self._b_enc))
            width = _whole_groups(len(rows))
            block = buffer[: self.num_rows * width].view(self.num_rows, width)
            torch.addmm(biases, self._x, rows.T, out=block[:, : len(rows)])
            if self._scale is not None:
                block[:, : len(rows)] *= self._scale[start:stop]
            block[:, len(rows) :].fill_(-torch.inf)
            yield start, block
        if self.device.type == "cpu":
            _kept.buffer = buffer

    def _take_buffer(self) -> Tensor:
        """The kept buffer, which then is nobody else's, or a new one."""
        entries = self.num_rows * self.block_latents
        buffer, _kept.buffer = getattr(_kept, "buffer", None), None
        fits = buffer is not None and self.device.type == "cpu" and buffer.dtype == self.dtype
        return buffer if fits and len(buffer) >= entries else self._x.new_empty(entries)


def _host_may_look(device: torch.device) -> bool:
    """Whether sizes may depend on the data: the host would wait for an accelerator to tell."""
    return device.type == "cpu"


def _whole_groups(size: int) -> int:
    return -(-size // _GROUP) * _GROUP


def with_nan_rows(chosen: Selection, x: Tensor) -> Selection:
    """A selection in which each row of `x` `(N, D)` that is not finite has one pair: NaN at latent 0.

    Such a row is above no threshold and would decode to the bias, as if nothing were wrong. So it decodes to NaN, in
    every prefix.
    """
    broken = ~x.isfinite().all(1)
    if not broken.any():
        return chosen
    kept, rows = ~broken[chosen[0]], broken.nonzero().squeeze(1)
    nan = chosen[2].new_full((len(rows),), torch.nan)
    return _joined([tuple(part[kept] for part in chosen), (rows, torch.zeros_like(rows), nan)])


def select_above(blocks: EncoderBlocks, threshold: Tensor | float) -> Selection:
    """Pairs strictly above `threshold` (a number or `(F,)`). How many there are is known to the data alone: the host
    waits for each block.

    Returns:
        Tokens, latents and pre-activations, `(M,)` each, sorted by token, then by latent.
    """
    found, mask = [], None
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
        found.append((rows, cols + start, block[rows, cols]))
    return _joined(found)


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
    found = kept.nonzero().squeeze(1)
    return tuple(part[found] for part in chosen)


def _select_largest(blocks: EncoderBlocks, count: int, per_row: bool, static: bool | None) -> Selection:
    """The largest `count` of each row or of all, over all blocks: the best so far against each next block."""
    if blocks.num_rows == 0 or count == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=blocks.device)
        return nothing, nothing, torch.empty(0, dtype=blocks.dtype, device=blocks.device)
    static = not _host_may_look(blocks.device) if static is None else static
    bags = blocks.num_rows if per_row else 1
    chosen = floor = None
    for start, block in blocks:
        maxima = block.view(blocks.num_rows, -1, _GROUP).amax(-1)
        if static:
            rows, cols, values = _fixed_candidates(block, maxima, bags, count)
        else:
            if floor is None:
                floor = _lower_bound(block, maxima, bags, count)
            rows, cols, values = _listed_candidates(block, maxima, floor)
        found = rows, cols + start, values
        found = found if chosen is None else _joined([chosen, found])
        chosen, floor = _cut_fixed(found, bags, count) if static else _cut_list(found, bags, count)
    assert chosen is not None
    return chosen


def _joined(parts: list[Selection]) -> Selection:
    """One selection of several, whose latents ascend: a stable sort by token orders them by token, then latent."""
    if len(parts) == 1:
        return parts[0]
    rows, cols, values = map(torch.cat, zip(*parts, strict=True))
    order = rows.argsort(stable=True)
    return rows[order], cols[order], values[order]


# Where the host may look: lists of candidates above a floor that never exceeds the cut. `bags` is N where every row
# has its own cut, 1 where the batch has one.


def _lower_bound(block: Tensor, maxima: Tensor, bags: int, count: int) -> Tensor:
    """`(bags, 1)` numbers that at least `count` entries reach."""
    entries, maxima = block.view(bags, -1), maxima.view(bags, -1)
    # Hardly more groups than places would give a floor that lets nearly everything through.
    source = maxima if maxima.shape[1] >= 1.5 * count else entries
    if source.shape[1] < count:
        return entries.new_full((bags, 1), -torch.inf)
    guess = _sampled_bound(source, count) if bags == 1 else None
    return source.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True) if guess is None else guess


def _sampled_bound(source: Tensor, count: int) -> Tensor | None:
    """A number a little below the `count` largest, from an evenly spaced sample, where that is certain to hold."""
    stride = source.shape[1] // _SAMPLE
    if stride < 2:
        return None
    expected = count / stride
    rank = int(expected + 4 * expected**0.5 + 8)  # four standard deviations of the sampling error
    sample = source[:, ::stride]
    if rank >= sample.shape[1]:
        return None
    guess = sample.topk(rank, dim=1, sorted=False).values.amin(1, keepdim=True)
    return guess if (source >= guess).sum() >= count else None


def _listed_candidates(block: Tensor, maxima: Tensor, floor: Tensor) -> Selection:
    """All entries of `block` that reach the floor; only groups whose maximum does are looked at."""
    per_row = maxima.shape[1]
    groups = (maxima >= floor).flatten().nonzero().squeeze(1)
    values = block.view(-1, _GROUP).index_select(0, groups)
    limit = floor[groups // per_row] if len(floor) > 1 else floor
    hit, place = (values >= limit).nonzero(as_tuple=True)
    group = groups[hit]
    return group // per_row, group % per_row * _GROUP + place, values[hit, place]


def _cut_list(found: Selection, bags: int, count: int) -> tuple[Selection, Tensor]:
    """The `count` largest of each bag, and the smallest of them (-inf where there are fewer)."""
    rows, cols, values = found
    bag = rows if bags > 1 else torch.zeros_like(rows)
    sizes = torch.bincount(bag, minlength=bags)
    width = max(int(sizes.max()), count)
    padded = values.new_full((bags, width), -torch.inf)
    padded[bag, torch.arange(len(bag), device=bag.device) - (sizes.cumsum(0) - sizes)[bag]] = values
    cut = padded.topk(count, dim=1, sorted=False).values.amin(1)
    kept = _above_or_first(values, cut[bag], bag, sizes, count).nonzero().squeeze(1)
    return (rows[kept], cols[kept], values[kept]), cut[:, None]


def _above_or_first(values: Tensor, cut: Tensor, bag: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Mask of the entries above their bag's cut, filled up to `count` with the first of those equal to it."""
    above, equal = values > cut, values == cut
    room = count - torch.zeros_like(sizes).index_add_(0, bag, above.to(sizes.dtype))
    earlier = F.pad(equal.cumsum(0), (1, 0))
    begin = earlier[sizes.cumsum(0) - sizes]
    return above | (equal & (earlier[1:] - begin[bag] <= room[bag]))


# Where the host may not look: as many candidates as there are places.


def _fixed_candidates(block: Tensor, maxima: Tensor, bags: int, count: int) -> Selection:
    """The `count` largest entries of each bag (all where there are fewer)."""
    entries, maxima = block.view(bags, -1), maxima.view(bags, -1)
    if maxima.shape[1] > count:
        groups = _first_largest(maxima, count)
        members = entries.view(bags, -1, _GROUP).gather(1, groups[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
        best = _first_largest(members, count)
        positions = groups.gather(1, best // _GROUP) * _GROUP + best % _GROUP
    else:
        positions = _first_largest(entries, min(count, entries.shape[1]))
    flat = positions + torch.arange(bags, device=block.device)[:, None] * entries.shape[1]
    return (
        (flat // block.shape[1]).flatten(),
        (flat % block.shape[1]).flatten(),
        entries.gather(1, positions).flatten(),
    )


def _cut_fixed(found: Selection, bags: int, count: int) -> tuple[Selection, None]:
    """The `count` largest of each bag; all bags hold as many."""
    rows, cols, values = (part.view(bags, -1) for part in found)
    if values.shape[1] > count:
        best = _first_largest(values, count)
        rows, cols, values = (part.gather(1, best) for part in (rows, cols, values))
    return (rows.flatten(), cols.flatten(), values.flatten()), None


def _first_largest(values: Tensor, count: int) -> Tensor:
    """Positions, ascending, of the `count` largest of each row; of equal ones the first win."""
    if count >= values.shape[1]:
        return torch.arange(values.shape[1], device=values.device).expand(len(values), -1)
    if values.dtype == torch.float64:  # no room for the position in 64 bits
        best = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return best.sort(dim=1).values
    keys = _ordered(values)
    if len(keys) == 1:
        return _first_largest_of_all(keys[0], count)[None]
    # torch.topk leaves open which of several equal entries it returns, so the position becomes part of the key.
    position = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return ((keys << 31) | position).topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def _ordered(values: Tensor) -> Tensor:
    """Integers of 32 bits, not negative, in the order of the numbers."""
    bits = (values.float() + 0.0).view(torch.int32).long()  # + 0.0: -0.0 equals 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31


def _first_largest_of_all(keys: Tensor, count: int) -> Tensor:
    """The same for one long row, whose cut two histograms find: torch.topk would sort millions of keys."""
    cut, wanted, among = keys.new_zeros(()), count, keys.new_ones(len(keys))
    for shift in (16, 0):
        digit = (keys >> shift) & 0xFFFF
        # How many of those still in question have at least this digit.
        at_least = keys.new_zeros(2**16).index_add_(0, digit, among).flip(0).cumsum(0).flip(0)
        best = (at_least >= wanted).sum() - 1
        wanted = wanted - F.pad(at_least, (0, 1)).gather(0, best[None] + 1).squeeze(0)
        among = among * (digit == best)
        cut = cut | (best << shift)
    equal = keys == cut
    return ((keys > cut) | (equal & (equal.cumsum(0) <= wanted))).nonzero_static(size=count).squeeze(1)
