"""The quantiser step of a progressive code: what it costs, and the largest that costs little.

    growth(step) = squared error of the reconstruction from quantised values / squared error without, minus 1

measured on the hidden states themselves. [`choose_step`] takes the largest step whose growth is at most 2%, or which
adds at most a thousandth of the variance, whichever allows more: the second is for dictionaries that hardly err.

Shapes: N tokens, D `d_in`, F latents, P widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import SAEModel
from ...models.sparse_ops import LatentPairs
from ..rate import CodeModel, Moments, RateSums, bins


GROWTH, LEAST_FVU = 0.02, 0.001
SAMPLE = 4096  # tokens that steps are tried on
_TRIALS = 9


@dataclass(frozen=True)
class StepCost:
    """What coding with a step costs, at each width.

    Args:
        step (`float`): Width of a bin, in the units of the latents' values.
        widths (`list[int]`): The P widths.
        bits (`list[float]`): Ideal bits per token.
        fvu (`list[float]`): Fraction of variance unexplained without quantisation.
        fvu_coded (`list[float]`): The same of what is decoded. Above 1, the mean of the hidden states is nearer to
            them than what the first latents give.
    """

    step: float
    widths: list[int]
    bits: list[float]
    fvu: list[float]
    fvu_coded: list[float]

    @property
    def growth(self) -> float:
        """Return the growth of the squared error at the full width, 0.02 for 2%."""
        return self.fvu_coded[-1] / self.fvu[-1] - 1 if self.fvu[-1] else 0.0

    def __str__(self) -> str:
        sentence = (
            f"step {self.step:.4g}: {self.bits[-1]:.1f} bits a token, FVU {self.fvu_coded[-1]:.4f} instead of "
            f"{self.fvu[-1]:.4f} ({self.growth:+.1%})"
        )
        bad = [str(width) for width, fvu in zip(self.widths, self.fvu_coded, strict=True) if fvu > 1]
        return sentence + (f"; cut at {', '.join(bad)} latents it is worse than the mean" if bad else "")


@torch.no_grad()
def step_cost(
    sae: SAEModel, x: Tensor, statistics: Moments, step: float, widths: Sequence[int] | None = None
) -> StepCost:
    """Measure what coding hidden states with a step costs.

    Args:
        sae ([`SAEModel`]): In `eval` mode.
        x (`Tensor` of shape `(N, D)`): Hidden states.
        statistics (any object with `tokens`, `frequency`, `mean`, `mean_square`): Statistics of the SAE's latents.
        step (`float`): Width of a bin.
        widths (`Sequence[int]`, *optional*): Widths; by default the SAE's prefix widths.
    """
    pairs = _firing(sae, x)
    widths = list(widths or sae.prefix_widths)
    sums = RateSums(statistics, widths, step)
    sums.add(pairs)
    exact, coded = (_errors(sae, x, one, widths) for one in (pairs, read_back(pairs, sums.model, step)))
    return StepCost(step, widths, sums.bits_per_token()["bits"].tolist(), exact, coded)


@torch.no_grad()
def choose_step(sae: SAEModel, x: Tensor, statistics: Moments, growth: float = GROWTH) -> float:
    """Return the largest step that hardly costs anything, by the rule at the head of this module.

    Args:
        sae ([`SAEModel`]): In `eval` mode.
        x (`Tensor` of shape `(N, D)`): Hidden states that are to be coded; up to 4,096 of them are used.
        statistics (any object with `tokens`, `frequency`, `mean`, `mean_square`): Statistics of the SAE's latents.
        growth (`float`, *optional*, defaults to 0.02): Largest growth of the squared error.
    """
    x = x[:: -(-len(x) // SAMPLE)]
    pairs, model = _firing(sae, x), CodeModel.of(statistics)
    width = [sae.config.num_latents]
    (exact,) = _errors(sae, x, pairs, width)
    most = max(exact * (1 + growth), exact + LEAST_FVU)
    small, large = 2.0**-6 * model.rms, 2 * model.rms
    for _ in range(_TRIALS):
        middle = (small * large) ** 0.5
        (coded,) = _errors(sae, x, read_back(pairs, model, middle), width)
        small, large = (middle, large) if coded <= most else (small, middle)
    return small


def read_back(pairs: LatentPairs, model: CodeModel, step: float) -> LatentPairs:
    """Return the latents as a decoder reads them from their bins."""
    model = model.to(pairs.values.device)
    values = model.read(pairs.cols, bins(pairs.values, step), step)
    return LatentPairs(pairs.index, values.to(pairs.values.dtype))


def _firing(sae: SAEModel, x: Tensor) -> LatentPairs:
    training = sae.training
    sae.eval()
    try:
        pairs = sae.encode_pairs(x.to(sae.W_enc))
    finally:
        sae.train(training)
    return pairs.keep(pairs.values > 0)


def _errors(sae: SAEModel, x: Tensor, pairs: LatentPairs, widths: Sequence[int]) -> list[float]:
    """Return FVU at each width; where hidden states do not vary, the squared error of unit variance."""
    x = x.to(sae.W_dec).double()
    variance = (x - x.mean(0)).square().sum() or x.new_ones(())
    return [((x - each.double()).square().sum() / variance).item() for each in sae.decode_pairs(pairs, list(widths))]
