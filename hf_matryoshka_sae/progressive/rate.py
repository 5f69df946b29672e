"""The rate of latents in bits: the probability model of the progressive code, and its ideal code length.

The model knows each latent's frequency, mean and mean square, and takes latents as independent:

    latent i fires on a token           Bernoulli(p_i)
    the logarithm of its value, if so   Normal(mu_i, sigma_i), by the first two moments of the value
    what is coded of the value a        its bin floor(a / step), read as the model's mean of the values in it

A log-normal has no mass below 0, as values have none, and is skewed as they are; on a small language model it took 0.1
to 0.35 bits less per value than a Gaussian or a Laplacian of the same moments. A value as read is off by less than
`step`; the squared error is about step^2 / 12 for small steps, and less for large ones.
Shapes: F latents, M pairs that fire, P widths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..common.distributed import reduce_sum
from ..models.sparse_ops import LatentPairs


# Least probability of a bin: a value costs at most 20 bits, however unlikely the model takes it to be.
RAREST = 2.0**-20

# A latent seen on few tokens may have fired at one value only; a spread of 0 could code no other.
_LEAST_SPREAD = 0.05

# Step as a share of the root mean square value. On BatchTopK Matryoshka and TopK SAEs of a small language model: 1.8
# bits a value and an error larger by 5%; half the step: 0.7 bits more for 1%; twice the step: 0.9 bits less for 11%.
_STEP_SHARE = 0.5


class Moments(Protocol):
    """The latent statistics that the model reads: `tokens`, and `[F]` frequency, E[a] and E[a^2] over all tokens."""

    tokens: int
    frequency: Tensor
    mean: Tensor
    mean_square: Tensor


@dataclass
class CodeModel:
    """Parameters of the probability model, float64.

    Args:
        fires (`Tensor` of shape `(F,)`): Probability that the latent fires on a token; neither 0 nor 1.
        location (`Tensor` of shape `(F,)`): Mean of the logarithm of its value where it fires.
        spread (`Tensor` of shape `(F,)`): Standard deviation of that logarithm.
        rms (`float`): Root mean square of all values that fire.
    """

    fires: Tensor
    location: Tensor
    spread: Tensor
    rms: float

    @classmethod
    def of(cls, statistics: Moments) -> "CodeModel":
        """Return the model of statistics, in which each latent fires once more than it did, with an average value.

        Raises:
            `ValueError`: if the statistics are not of one length, not finite, of no token, or of latents that never
                fire.
        """
        _check(statistics)
        firings = statistics.frequency * statistics.tokens
        rate, mean, square = (getattr(statistics, name) for name in ("frequency", "mean", "mean_square"))
        average, average_square = (float(moment.sum() / rate.sum()) for moment in (mean, square))
        mean = (mean * statistics.tokens + average) / (firings + 1)
        square = (square * statistics.tokens + average_square) / (firings + 1)
        variance = (square / mean.square()).log().clamp(min=_LEAST_SPREAD**2)
        return cls(
            fires=(firings + 0.5) / (statistics.tokens + 1),
            location=mean.log() - variance / 2,
            spread=variance.sqrt(),
            rms=math.sqrt(average_square),
        )

    def __len__(self) -> int:
        return len(self.fires)

    def to(self, device: torch.device | str) -> "CodeModel":
        """Return the same model on another device."""
        return CodeModel(self.fires.to(device), self.location.to(device), self.spread.to(device), self.rms)

    def above(self, latents: Tensor, values: Tensor) -> Tensor:
        """Return the probability that a latent that fires has more than `values`; both `(M,)`."""
        return torch.special.ndtr((self.location[latents] - values.log()) / self.spread[latents])

    def value_bits(self, latents: Tensor, values: Tensor, step: float) -> Tensor:
        """Return the ideal code length `(M,)` of values that fire, each read as its bin of width `step`."""
        low = bins(values, step) * step
        mass = self.above(latents, low) - self.above(latents, low + step)
        return -mass.clamp(min=RAREST).log2()

    def read(self, latents: Tensor, numbers: Tensor, step: float) -> Tensor:
        """Return the mean of the values that fire within bins, `(M,)` float64, as which a bin is read."""
        location, spread, low = self.location[latents], self.spread[latents], numbers.double() * step
        ends = (location - torch.stack([low, low + step]).log()) / spread
        mass = torch.special.ndtr(ends)
        moment = torch.special.ndtr(ends + spread) * (location + spread.square() / 2).exp()
        mean = (moment[0] - moment[1]) / (mass[0] - mass[1])
        # Where the model has next to no mass, its mean is a ratio of rounding errors.
        mean = torch.where(mass[0] - mass[1] > RAREST, mean, low + step / 2)
        return torch.minimum(torch.maximum(mean, low), low + step)


def bins(values: Tensor, step: float) -> Tensor:
    """Return the bin `floor(value / step)` of each value, as float64."""
    return (values.double() / step).floor()


def default_step(statistics: Moments) -> float:
    """Return half of the root mean square of the values that fire, in the units of the SAE's latents."""
    return _STEP_SHARE * CodeModel.of(statistics).rms


def checked_step(step: float) -> float:
    """Return `step`, or raise `ValueError` if it is not positive and finite."""
    if not 0 < step < math.inf:
        raise ValueError(
            f"`step` must be a positive number, in the units of the latents' values; got {step}. "
            "`default_step(statistics)` is one."
        )
    return float(step)


class RateSums:
    """Sums from which the rate at every width follows: one pass, over batches and processes.

    Args:
        statistics (any object with `tokens`, `frequency`, `mean`, `mean_square`): Statistics that encoder and decoder
            share, measured on other data than is coded.
        widths (`Sequence[int]`): P increasing widths, at most F.
        step (`float`, *optional*): Width of a bin, in the units of the latents' values; [`default_step`] by default.

    Raises:
        `ValueError`: if the widths do not increase up to at most F, or the step is not positive.
    """

    def __init__(self, statistics: Moments, widths: Sequence[int], step: float | None = None) -> None:
        self.model = CodeModel.of(statistics)
        self.step = _STEP_SHARE * self.model.rms if step is None else checked_step(step)
        self.widths = checked_widths(widths, len(self.model))
        self._sums = self.model.fires.new_zeros(2, len(self.model))  # firings, and bits of their values
        self._tokens = self.model.fires.new_zeros(())

    def add(self, pairs: LatentPairs) -> None:
        """Count a batch: the pairs of the full dictionary, or of the widest width.

        Raises:
            `ValueError`: if the pairs are of another dictionary, or a value is not finite.
        """
        if pairs.num_latents != len(self.model):
            raise ValueError(
                f"The statistics are of {len(self.model)} latents, the pairs of {pairs.num_latents}. "
                "Take the statistics of the SAE that the pairs are of."
            )
        device, values = pairs.values.device, pairs.values.detach()
        if not values.isfinite().all():
            raise ValueError("A latent's value is not finite; leave out the tokens whose hidden states are not.")
        if self._sums.device != device:
            self.model, self._sums, self._tokens = (
                self.model.to(device),
                self._sums.to(device),
                self._tokens.to(device),
            )
        fires = values > 0
        latents, values = pairs.cols[fires], values[fires].double()
        bits = self.model.value_bits(latents, values, self.step)
        self._sums.index_add_(1, latents, torch.stack([torch.ones_like(bits), bits]))
        self._tokens += pairs.num_rows

    def bits_per_token(self) -> dict[str, Tensor]:
        """Return the rate of each width, averaged over tokens.

        Returns:
            `dict[str, Tensor]`, each `(P,)` and float64: `"index_bits"` (which latents fire), `"value_bits"` (their
            bins), `"bits"` (both), `"l0"` (latents that fire).

        Raises:
            `ValueError`: if no token was counted.
        """
        sums, tokens = reduce_sum(self._sums.clone(), self._tokens.clone())
        if not tokens:
            raise ValueError("No token was counted, so there is no rate. Add pairs first.")
        firings, value_bits = sums / tokens
        yes, no = self.model.fires.log2(), torch.log1p(-self.model.fires) / math.log(2)
        index_bits = -(firings * yes + (1 - firings) * no)
        ends = torch.tensor(self.widths, device=sums.device) - 1
        index, value, l0 = (of_latent.cumsum(0)[ends] for of_latent in (index_bits, value_bits, firings))
        return {"index_bits": index, "value_bits": value, "bits": index + value, "l0": l0}


def bits_per_token(
    pairs: LatentPairs, statistics: Moments, widths: Sequence[int], step: float | None = None
) -> dict[str, Tensor]:
    """Return the ideal bits per token of one batch at each width; [`RateSums`] takes several batches."""
    sums = RateSums(statistics, widths, step)
    sums.add(pairs)
    return sums.bits_per_token()


def naive_bits(l0: Tensor, widths: Sequence[int]) -> dict[str, Tensor]:
    """Return the bits per token without a model, with values as 32-bit floats.

    Args:
        l0 (`Tensor` of shape `(P,)`): Latents that fire, per token.
        widths (`Sequence[int]`): P widths.

    Returns:
        `dict[str, Tensor]`, each `(P,)`: `"set_bits"`, `log2 C(width, l0) + 32 l0`; `"list_bits"`,
        `l0 (log2 width + 32)`.
    """
    width = torch.tensor(widths, dtype=torch.float64, device=l0.device)
    l0 = l0.double()
    subsets = torch.lgamma(width + 1) - torch.lgamma(l0 + 1) - torch.lgamma(width - l0 + 1)
    return {"set_bits": subsets / math.log(2) + 32 * l0, "list_bits": l0 * (width.log2() + 32)}


def checked_widths(widths: Sequence[int], num_latents: int) -> list[int]:
    """Return `widths` as a list, or raise `ValueError` unless they strictly increase between 1 and F."""
    widths = [int(width) for width in widths]
    if not widths or widths[-1] > num_latents or any(a >= b for a, b in zip([0, *widths], widths, strict=False)):
        raise ValueError(f"Widths must strictly increase between 1 and num_latents ({num_latents}), got {widths}.")
    return widths


def _check(statistics: Moments) -> None:
    moments = {name: getattr(statistics, name) for name in ("frequency", "mean", "mean_square")}
    if len({tuple(moment.shape) for moment in moments.values()}) != 1 or statistics.frequency.ndim != 1:
        raise ValueError(f"Statistics must be `[F]` each, got { {n: tuple(m.shape) for n, m in moments.items()} }.")
    for name, moment in moments.items():
        if moment.dtype != torch.float64 or not moment.isfinite().all() or (moment < 0).any():
            raise ValueError(f"`{name}` must be float64, finite and not negative. Measure the statistics anew.")
    if statistics.tokens < 1 or not 0 < statistics.frequency.max() <= 1:
        raise ValueError(
            f"Statistics of {statistics.tokens} tokens, the most frequent latent firing on a share of "
            f"{statistics.frequency.max()}, give no probabilities. Measure them on data of the SAE's hookpoint."
        )
