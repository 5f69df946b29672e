"""Exact cuts: candidates for the largest entries of a token or of a batch, and the largest of the candidates.

A bag is what has a cut of its own: a token (N bags) or the batch (one). Where the host may look at the data,
candidates are lists above a floor that never exceeds the cut; where it may not, they are as many as the places.

Shapes: N tokens, B latents of a block, G groups of a block, M pairs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder_blocks import GROUP


Selection = tuple[Tensor, Tensor, Tensor]
_SAMPLE = 2**16


# Where the host may look


def lower_bound(maxima: Tensor, entries: Callable[[], Tensor], bags: int, count: int) -> Tensor:
    """`(bags, 1)` numbers that at least `count` entries reach.

    Args:
        maxima (`Tensor` of shape `(N, G)`): Numbers that the largest entries of groups reach.
        entries (`Callable`): Gives the same of all entries, `(N, B)`.
        bags (`int`): N where every token has its own cut, 1 where the batch has one.
        count (`int`): Places of a bag.
    """
    # Hardly more groups than places would give a floor that lets nearly everything through.
    source = (maxima if maxima.numel() >= 1.5 * count * bags else entries()).reshape(bags, -1)
    if source.shape[1] < count:
        return source.new_full((bags, 1), -torch.inf)
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


def listed_candidates(block: Tensor, maxima: Tensor, floor: Tensor) -> Selection:
    """All entries of `block` that reach the floor; only groups whose maximum does are looked at."""
    per_row = maxima.shape[1]
    groups = (maxima >= floor).flatten().nonzero().squeeze(1)
    values = block.view(-1, GROUP).index_select(0, groups)
    limit = floor[groups // per_row] if len(floor) > 1 else floor
    hit, place = (values >= limit).nonzero(as_tuple=True)
    group = groups[hit]
    return group // per_row, group % per_row * GROUP + place, values[hit, place]


def cut_list(found: Selection, bags: int, count: int) -> tuple[Selection, Tensor]:
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


# Where the host may not look


def fixed_candidates(block: Tensor, maxima: Tensor, bags: int, count: int) -> Selection:
    """The `count` largest entries of each bag (all where there are fewer)."""
    entries, maxima = block.view(bags, -1), maxima.view(bags, -1)
    if maxima.shape[1] > count:
        groups = _first_largest(maxima, count)
        members = entries.view(bags, -1, GROUP).gather(1, groups[:, :, None].expand(-1, -1, GROUP)).flatten(1)
        best = _first_largest(members, count)
        positions = groups.gather(1, best // GROUP) * GROUP + best % GROUP
    else:
        positions = _first_largest(entries, min(count, entries.shape[1]))
    flat = positions + torch.arange(bags, device=block.device)[:, None] * entries.shape[1]
    return (
        (flat // block.shape[1]).flatten(),
        (flat % block.shape[1]).flatten(),
        entries.gather(1, positions).flatten(),
    )


def cut_fixed(found: Selection, bags: int, count: int) -> tuple[Selection, None]:
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
