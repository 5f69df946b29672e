"""Forward greedy selection: the next latent is the one that lowers the squared error most.

Activations are fixed (all latents compete, then some are left out), so the error of a set S of latents is

    E||x - b_dec - sum_S a_i d_i||^2 = E||x - b_dec||^2 - 2 sum_S b_i + sum_SS G_ij
    b_i = E[a_i (x - b_dec) . d_i],   G_ij = E[a_i a_j] d_i . d_j

and adding latent i to S lowers it by `2 (b_i - sum_S G_ij) - G_ii`: one pass over the data gives b and G, and no step
needs the tokens again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..common.distributed import processes, reduce_sum
from ..evaluation.data import HasActivations, activation_batches
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs
from .statistics import along_decoder, decoder_rows, firing_blocks


MAX_GREEDY_LATENTS = 16_384
"""Above that many latents G alone takes more than 2 GiB."""

_PRODUCTS_AT_ONCE = 2**22  # co-firing pairs that are listed together
_ROWS_AT_ONCE = 512  # rows of F x F matrices that are multiplied together


@dataclass
class GreedyOrder:
    """Latents in the order in which greedy selection takes them.

    Args:
        order (`Tensor` of shape `(F,)`): Places of the latents, in the order of selection.
        error (`Tensor` of shape `(F + 1,)`): `E||x - reconstruction||^2` with the first n, n = 0 to F, in float64.
        variance (`float`): `E||x - E[x]||^2`.
    """

    order: Tensor
    error: Tensor
    variance: float

    @property
    def fvu(self) -> Tensor:
        """Return the fraction of variance unexplained by the first n latents, n = 0 to F."""
        return self.error / self.variance


def greedy_order(
    sae: SAEModel, activations: HasActivations | Iterable[Tensor], widths: Sequence[int] | None = None
) -> GreedyOrder:
    """Order latents by greedy forward selection on the squared error; return the order and the errors.

    One pass over the data; sums are in float64 and over all processes. Ties go to the lower index. A latent that never
    fires changes nothing, and comes before those that raise the error.

    Args:
        sae ([`SAEModel`]): An SAE of at most `MAX_GREEDY_LATENTS` latents, as F^2 doubles are kept: 2 GiB at most.
        activations ([`HeldOut`] or an iterable of `(n, D)` tensors): Raw hidden states.
        widths (`list[int]`, *optional*): Prefix widths: latents of a narrower prefix come before all others.

    Raises:
        `ValueError`: if there are too many latents, or no hidden states, or some of another width or not finite.
    """
    if sae.config.num_latents > MAX_GREEDY_LATENTS:
        raise ValueError(
            f"Greedy selection keeps an F x F matrix and takes at most {MAX_GREEDY_LATENTS:,} latents; this SAE has "
            f"{sae.config.num_latents:,}. Rank by 'energy' or 'leave_one_out', or greedily rank what pruning left."
        )
    moments = _Moments(sae)
    batches = tqdm(activation_batches(activations), desc="co-firing", disable=processes()[0] != 0, leave=False)
    for _, x, pairs in firing_blocks(sae, batches):
        moments.add(x, pairs)
    linear, quadratic, empty, variance = moments.problem()
    order, gains = _select(linear, quadratic, list(widths or [len(linear)]))
    error = torch.cat([empty[None], empty - gains.cumsum(0)])
    return GreedyOrder(order.cpu(), error.cpu(), variance)


def add_products(total: Tensor, pairs: LatentPairs) -> None:
    """Add `a_i a_j`, summed over tokens, to a matrix `(F, F)` of float64 in place.

    Pairs of latents that fire together are listed, token by token; where many fire, a matmul does it.
    """
    values = pairs.values.double()
    if pairs.index.dense:
        dense = pairs.index.spread(values)
        total.addmm_(dense.T, dense)
        return
    offsets = pairs.index.by_token
    counts = offsets.diff()[pairs.rows]  # partners of each pair: all that fire on its token, itself included
    ends = counts.cumsum(0)
    start = 0
    while start < len(values):
        done = int(ends[start - 1]) if start else 0
        limit = torch.tensor(done + _PRODUCTS_AT_ONCE, device=ends.device)
        stop = max(start + 1, int(torch.searchsorted(ends, limit, right=True)))
        left = torch.arange(start, stop, device=ends.device).repeat_interleave(counts[start:stop])
        first = (ends - counts)[left] - done
        right = offsets[pairs.rows[left]] + torch.arange(len(left), device=ends.device) - first
        places = pairs.cols[left] * pairs.num_latents + pairs.cols[right]
        total.view(-1).index_add_(0, places, values[left] * values[right])
        start = stop


class _Moments:
    """The sums over tokens from which latents are selected."""

    def __init__(self, sae: SAEModel) -> None:
        self.sae, latents = sae, sae.config.num_latents
        self.linear, self.products, self.x, self.scalars = (
            torch.zeros(shape, dtype=torch.float64, device=sae.W_dec.device)
            for shape in ((latents,), (latents, latents), (sae.config.d_in,), (3,))
        )

    def add(self, x: Tensor, pairs: LatentPairs) -> None:
        x = x.to(self.x)
        centred = x - self.sae.b_dec.detach()
        self.linear.index_add_(0, pairs.cols, pairs.values.double() * along_decoder(self.sae, pairs, centred))
        add_products(self.products, pairs)
        self.x += x.sum(0)
        self.scalars += torch.stack([x.new_tensor(len(x)), x.square().sum(), centred.square().sum()])

    def problem(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return b, G, the error with no latent, and the variance, over all processes."""
        reduce_sum(self.linear, self.products, self.x, self.scalars)
        tokens, square, empty = self.scalars
        if not tokens:
            raise ValueError("There are no hidden states to select latents on: the activations are empty.")
        rows = decoder_rows(self.sae).double()
        for products, left in zip(self.products.split(_ROWS_AT_ONCE), rows.split(_ROWS_AT_ONCE), strict=True):
            products.mul_(left @ rows.T).div_(tokens)
        variance = square / tokens - (self.x / tokens).square().sum()
        return self.linear / tokens, self.products, empty / tokens, variance.item()


def _select(linear: Tensor, quadratic: Tensor, widths: list[int]) -> tuple[Tensor, Tensor]:
    """Return the order, and by how much each latent lowers the error when it is selected."""
    gain = 2 * linear - quadratic.diagonal()
    order = torch.empty(len(linear), dtype=torch.int64, device=linear.device)
    gains = torch.empty_like(linear)
    selected = 0
    for width in widths:
        closed = torch.full_like(gain, -torch.inf)  # -inf for latents of wider prefixes, and for selected ones
        closed[selected:width] = 0
        for step in range(selected, width):
            best = (gain + closed).argmax()
            order[step], gains[step], closed[best] = best, gain[best], -torch.inf
            gain -= 2 * quadratic[best]
        selected = width
    return order, gains
