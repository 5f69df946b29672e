"""How often and how strongly each latent fires: counts by bins of activation, and quantiles from them.

Bins follow the bits of a float32: an octave is cut into 8 of equal width, so the bin of a value is a shift of its
bits, the same on every device. Counts are whole numbers, so they add up to the same in any order.

Shapes: F latents, M pairs.
"""

import torch
from torch import Tensor

from ...evaluation.firing import add_moments


PROBABILITIES = (0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95, 0.99)
"""Probabilities of the quantiles in an index, over the tokens on which a latent fires."""

_MANTISSA_BITS, _EXPONENT_BIAS = 3, 127
_PER_OCTAVE = 2**_MANTISSA_BITS
_LOWEST, _HIGHEST = -20, 20  # powers of two; values outside are counted in the outermost bins
BINS = _PER_OCTAVE * (_HIGHEST - _LOWEST)
_LATENTS_AT_ONCE = 4096


def bins_of(values: Tensor) -> Tensor:
    """Return the bin of each positive value, int64."""
    bits = values.float().view(torch.int32) >> (23 - _MANTISSA_BITS)
    return (bits.long() - (_EXPONENT_BIAS + _LOWEST) * _PER_OCTAVE).clamp_(0, BINS - 1)


def bin_edges() -> Tensor:
    """Return the edges of the bins, `(BINS + 1,)` in float64."""
    places = torch.arange(BINS + 1)
    octave = torch.exp2((places // _PER_OCTAVE + _LOWEST).double())
    return octave * (1 + (places % _PER_OCTAVE).double() / _PER_OCTAVE)


class LatentSums:
    """Counts and sums of each latent's activations over tokens.

    Args:
        num_latents (`int`): Number F of latents.
        device (`torch.device`, *optional*): Device of the sums.
    """

    def __init__(self, num_latents: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_latents, BINS, dtype=torch.int32, device=device)
        self.first = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.first_only = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.moments = torch.zeros(2, num_latents, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, cols: Tensor, values: Tensor, tokens: int) -> None:
        """Add latents `(M,)` and their activations `(M,)` on this number of tokens."""
        self.tokens += tokens
        self.counts.view(-1).index_add_(0, cols * BINS + bins_of(values), torch.ones_like(cols, dtype=torch.int32))
        add_moments(self.moments, cols, values)

    def add_first(self, cols: Tensor, counted: bool) -> None:
        """Add latents that fire at first positions of windows; `counted`: whether [`add`] gets them too."""
        counts = torch.bincount(cols, minlength=len(self.first))
        self.first += counts
        if not counted:
            self.first_only += counts

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state into these tensors."""
        for name, tensor in vars(self).items():
            tensor.copy_(state[name])

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the sums of another process."""
        for name, tensor in vars(self).items():
            tensor += state[name].to(tensor.device)

    def firings(self) -> Tensor:
        """Return the number of tokens on which each latent fires, `(F,)`."""
        return self.counts.sum(1, dtype=torch.int64)

    def first_position_share(self) -> Tensor:
        """Return the share of each latent's firings at the first position of a window, `(F,)`, 0 for dead latents.

        The first position counts here even where it is left out of everything else.
        """
        return self.first.double() / (self.firings() + self.first_only).clamp(min=1)

    def quantiles(self, largest: Tensor, probabilities: tuple[float, ...] = PROBABILITIES) -> Tensor:
        """Return quantiles `(F, p)` over the tokens on which a latent fires, linear in a bin; NaN for dead latents.

        Args:
            largest (`Tensor` of shape `(F,)`): Largest activation, which no quantile exceeds.
            probabilities (`tuple[float]`, *optional*): Probabilities of the p quantiles.
        """
        edges = bin_edges().to(self.counts.device)
        shares = edges.new_tensor(probabilities)
        parts = []
        for counts, limit in zip(self.counts.split(_LATENTS_AT_ONCE), largest.split(_LATENTS_AT_ONCE), strict=True):
            below = counts.double().cumsum(1)
            ranks = below[:, -1:] * shares
            place = torch.searchsorted(below, ranks).clamp_(max=BINS - 1)
            inside = counts.gather(1, place).double()
            part = (ranks - (below.gather(1, place) - inside)) / inside
            values = edges[place] + part * (edges[place + 1] - edges[place])
            parts.append(torch.minimum(values, limit.double()[:, None]))
        return torch.cat(parts)

    def firings_between(self, edges: Tensor) -> Tensor:
        """Return the number of firings between edges of activation `(F, B + 1)`, `(F, B)`, linear in a bin.

        The last edge is a latent's largest activation, or above it.
        """
        places = bins_of(edges.clamp(min=2.0**_LOWEST))
        bounds = bin_edges().to(edges.device)
        part = ((edges.double() - bounds[places]) / (bounds[places + 1] - bounds[places])).clamp(0, 1)
        parts = []
        for counts, place, inside in zip(
            self.counts.split(_LATENTS_AT_ONCE),
            places.split(_LATENTS_AT_ONCE),
            part.split(_LATENTS_AT_ONCE),
            strict=True,
        ):
            below = counts.double().cumsum(1)
            own = counts.gather(1, place)
            parts.append(below.gather(1, place) - own * (1 - inside))
        below = torch.cat(parts).round_()
        below[:, 0], below[:, -1] = 0, self.firings()
        return below.diff(dim=1).long()
