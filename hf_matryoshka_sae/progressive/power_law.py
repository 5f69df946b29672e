"""Power-law fits to one importance per latent, and tests of them, after Clauset, Shalizi and Newman.

The dictionary power-law hypothesis (Peter & Søgaard, 2505.00190) is that importance falls with rank r as r^-s. Values
of density p(v) ~ v^-alpha above `v_min` do so with s = 1 / (alpha - 1): a value's rank counts the values above it. On
a plot of log importance against log rank nearly everything looks straight, so the fit is one of maximum likelihood to
the values, with a test of fit and of the alternatives (Power-law distributions in empirical data, SIAM Review 51,
2009); the straight line through the plot is there too, with those of the alternatives.

Everything is computed on y = log(v / v_min) >= 0, where a power law is the exponential density b exp(-b y) with
b = alpha - 1, and a log-normal is a normal cut off at 0. Values are taken as continuous: counts of a few (frequencies
of rare latents) come in steps that no continuous law fits, and `v_min` is then found above them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import optimize, special, stats
from torch import Tensor
from tqdm.auto import tqdm

from ..common.distributed import processes
from ..models import SAEModel


_FEWEST = 50  # values in a tail: fewer fit anything (Clauset et al., section 3.2)
_FEWEST_DIFFERENT = 10
_SHARE = 0.1  # of the live latents are in a tail, at least: the claim is about a dictionary, not its few largest
_CANDIDATES = 50  # for v_min; the distance changes slowly with it
_FEWEST_RESAMPLES = 20
_LEVEL = 0.1  # p-values below it decide (Clauset et al., section 4.1)
_DEVIATIONS = stats.norm.ppf(0.975)  # of a 95% interval


@dataclass
class Comparison:
    """The power law against another distribution of the values above `v_min`.

    Args:
        log_ratio (`float`): Log-likelihood of the power law minus that of the other; below 0 the other fits better.
        p_value (`float`): How probable a ratio this far from 0 is if it only differs from 0 by chance. Vuong's test
            against the exponential. A power law is the limit of log-normals of great variance, and Vuong's test takes
            a distribution for no limit of the other: against the log-normal it is the likelihood-ratio test, half a
            chi-square of one degree of freedom.
    """

    log_ratio: float
    p_value: float


@dataclass
class RankFit:
    """Least squares of log importance against a function of the rank r, over a range of ranks.

    Args:
        ranks (`tuple[int, int]`): First and last rank; 1 is the most important latent.
        exponent (`float`): s of importance ~ r^-s.
        r2 (`float`): Share of the variance of log importance explained by log r.
        r2_exponential (`float`): The same with importance ~ exp(-c r).
        r2_log_normal (`float`): The same with the normal quantile of (r - 1/2) / F, a straight line where the F values
            that are not zero are log-normal.
    """

    ranks: tuple[int, int]
    exponent: float
    r2: float
    r2_exponential: float
    r2_log_normal: float


@dataclass
class PowerLawFit:
    """The fit of [`fit_power_law`]; `str()` describes it in a line.

    Args:
        values (`int`): Number of latents.
        zeros (`int`): Number of latents of importance 0, which are left out.
        minimum (`float`): `v_min`, where the power law starts, in the units of the importance.
        tail (`int`): Number of latents at or above `minimum`, which are fitted.
        tail_share (`float`): Their share of the latents that are not zero.
        alpha (`float`): Exponent of the density p(v) ~ v^-alpha above `minimum`.
        alpha_interval (`tuple[float, float]`): 95% interval of `alpha`.
        rank_exponent (`float`): s = 1 / (alpha - 1) of importance ~ rank^-s.
        rank_exponent_interval (`tuple[float, float]`): 95% interval of `rank_exponent`.
        interval_from (`str`): `"bootstrap"`: from the spread of log(alpha - 1) over resampled latents, `v_min` chosen
            anew for each. `"likelihood"`: exact where `minimum` was given, too narrow where `v_min` was chosen.
        ks_distance (`float`): Largest distance between the cumulative distributions of the tail and of the fit.
        p_value (`float`, *optional*): Share of samples of the fitted law that lie further from their own fit than the
            values from theirs. Below 0.1 the values are not a power law's.
        resamples (`int`): Number of samples behind `p_value` and the interval.
        log_normal (`Comparison`): Comparison with a log-normal above `minimum`.
        exponential (`Comparison`): Comparison with an exponential distribution above `minimum`.
        least_squares (`RankFit`): The straight line on a log-log plot.
        verdict (`str`): `"power law"`; `"log-normal"` or `"exponential"` if one of them fits significantly better (the
            likelier by Akaike's criterion, which does not say that it fits well); `"none"` if neither does and yet the
            power law is rejected; `"undecided"` if an exponential would do as well.
    """

    values: int
    zeros: int
    minimum: float
    tail: int
    tail_share: float
    alpha: float
    alpha_interval: tuple[float, float]
    rank_exponent: float
    rank_exponent_interval: tuple[float, float]
    interval_from: str
    ks_distance: float
    p_value: float | None
    resamples: int
    log_normal: Comparison
    exponential: Comparison
    least_squares: RankFit
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.rank_exponent_interval
        p_value = "" if self.p_value is None else f", p {self.p_value:.2f}"
        return (
            f"{self.verdict}: rank exponent {self.rank_exponent:.3f} [{low:.3f}, {high:.3f}] (alpha {self.alpha:.2f}) "
            f"over the top {self.tail} of {self.values - self.zeros} values ({self.zeros} zeros left out), "
            f"KS distance {self.ks_distance:.3f}{p_value}"
        )


def fit_power_law(
    importance: Tensor | np.ndarray,
    minimum: float | None = None,
    ranks: tuple[int, int] | None = None,
    resamples: int = 100,
    seed: int = 0,
) -> PowerLawFit:
    """Fit a power law to one value per latent, and test it; return the fit.

    Args:
        importance (`Tensor` or `np.ndarray`): Energy, frequency or any other importance of each latent, `[F]`, in any
            unit; zeros are left out.
        minimum (`float`, *optional*): Smallest value of the tail, `v_min`. By default the one whose fit has the least
            Kolmogorov-Smirnov distance, among those that keep a tenth of the values.
        ranks (`tuple[int, int]`, *optional*): First and last rank of the least-squares line; by default all values
            that are not zero.
        resamples (`int`, *optional*, defaults to 100): Samples for the p-value, and again for the interval. The
            p-value's standard error is at most 0.5 / sqrt(resamples). With 0 there is no p-value. With 0 or with
            `minimum` the interval is the likelihood's.
        seed (`int`, *optional*, defaults to 0): Seed of the samples.

    Raises:
        `ValueError`: values that are NaN, infinite, negative, constant, or fewer than 50 above 0 or above `minimum`.
    """
    if resamples and resamples < _FEWEST_RESAMPLES:
        raise ValueError(f"`resamples` must be 0 or at least {_FEWEST_RESAMPLES}, got {resamples}.")
    values = flat(importance)
    positive = np.sort(values[values > 0])
    _check_tail(positive, minimum)
    cut = None if minimum is None else float(np.log(minimum))
    logs = np.log(positive)
    tail = _fit_tail(logs, cut)
    excess = logs[tail.start :] - tail.cut
    log_normal, exponential = _against_log_normal(excess, tail.rate), _against_exponential(excess, tail.rate)
    p_value, spread = _resample(logs, tail, cut, resamples, np.random.default_rng(seed))
    low, high = _interval(tail.rate, len(excess), spread)
    return PowerLawFit(
        values=len(values),
        zeros=len(values) - len(positive),
        minimum=float(positive[tail.start]) if minimum is None else float(minimum),
        tail=len(excess),
        tail_share=len(excess) / len(positive),
        alpha=1 + tail.rate,
        alpha_interval=(1 + low, 1 + high),
        rank_exponent=1 / tail.rate,
        rank_exponent_interval=(1 / high, 1 / low),
        interval_from="likelihood" if spread is None else "bootstrap",
        ks_distance=tail.distance,
        p_value=p_value,
        resamples=resamples,
        log_normal=log_normal,
        exponential=exponential,
        least_squares=_fit_ranks(logs[::-1], ranks),
        verdict=_verdict(p_value, log_normal, exponential),
    )


@torch.no_grad()
def decoder_spectrum(sae: SAEModel | Tensor) -> Tensor:
    """Return eigenvalues of the decoder rows' covariance, (1/F) sum_i (d_i - d_mean)(d_i - d_mean)^T (2505.00190).

    Args:
        sae (`SAEModel` or `Tensor`): A dictionary, or its `W_dec`, `[F, D]`.

    Returns:
        `Tensor`: the min(F, D) largest, in descending order, float64. Those that rounding cannot tell from 0 are 0.

    Raises:
        `ValueError`: `W_dec` is not a matrix, or not finite.
    """
    rows = sae if isinstance(sae, Tensor) else sae.W_dec
    if rows.ndim != 2 or not rows.isfinite().all():
        raise ValueError(f"Expected a finite decoder of shape [num_latents, d_in], got {tuple(rows.shape)}.")
    pieces = rows.split(8192)  # a float64 copy of the whole would be several times its size
    mean = sum(piece.double().sum(0) for piece in pieces) / len(rows)
    covariance = sum((piece.double() - mean).T @ (piece.double() - mean) for piece in pieces) / len(rows)
    values = torch.linalg.eigvalsh(covariance).flip(0)[: min(rows.shape)]
    floor = values[0] * rows.shape[1] * torch.finfo(torch.float64).eps
    return values.where(values > floor, 0)


def flat(importance: Tensor | np.ndarray) -> np.ndarray:
    """Return one finite, non-negative float64 per latent, or a `ValueError`."""
    if isinstance(importance, Tensor):
        importance = importance.detach().double().cpu().numpy()
    values = np.asarray(importance, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"`importance` must have one value per latent, [F], got shape {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(
            f"`importance` must be finite; {(~np.isfinite(values)).sum()} of {len(values)} values are not."
        )
    if (values < 0).any():
        raise ValueError(
            f"`importance` must not be negative; {(values < 0).sum()} of {len(values)} values are, the least "
            f"{values.min():.3g}. A power law is about magnitudes: set negative ones to 0 or take absolute values."
        )
    return values


def _check_tail(positive: np.ndarray, minimum: float | None) -> None:
    if minimum is not None and not 0 < minimum < np.inf:
        raise ValueError(f"`minimum` must be a finite number above 0, got {minimum}.")
    tail = positive if minimum is None else positive[positive >= minimum]
    above = "above 0" if minimum is None else f"of at least `minimum` ({minimum})"
    if len(tail) < _FEWEST:
        raise ValueError(f"A power law needs {_FEWEST} values {above}, got {len(tail)}.")
    num_different = len(np.unique(tail))
    if num_different < _FEWEST_DIFFERENT:
        raise ValueError(
            f"The {len(tail)} values {above} are constant or nearly so: a power law needs {_FEWEST_DIFFERENT} "
            f"different ones, got {num_different}. Frequencies in so few steps need more tokens."
        )


class _Tail(NamedTuple):
    distance: float
    rate: float  # alpha - 1
    start: int  # index of the first value of the tail
    cut: float  # log v_min


def _fit_tail(logs: np.ndarray, cut: float | None) -> _Tail:
    """Return the maximum-likelihood fit above `cut`, or above the cut of least distance; `logs` ascend."""
    if cut is not None:
        return _fit_above(logs, int(np.searchsorted(logs, cut)), cut)
    total = len(logs)
    sizes = np.geomspace(max(_FEWEST, _SHARE * total), total, _CANDIDATES).round().astype(int)
    starts = np.unique(np.searchsorted(logs, logs[total - sizes]))  # equal values are all in the tail or all out of it
    return min(_fit_above(logs, start, logs[start]) for start in starts)


def _fit_above(logs: np.ndarray, start: int, cut: float) -> _Tail:
    excess = logs[start:] - cut
    if not excess.any():  # all equal, as many of the largest values or a sample can be: the steepest of laws
        return _Tail(1.0, np.inf, int(start), float(cut))
    rate = 1 / excess.mean()
    fitted = -np.expm1(-rate * excess)
    steps = np.arange(len(excess) + 1) / len(excess)
    distance = max((steps[1:] - fitted).max(), (fitted - steps[:-1]).max())
    return _Tail(float(distance), float(rate), int(start), float(cut))


def _resample(
    logs: np.ndarray, tail: _Tail, cut: float | None, resamples: int, rng: np.random.Generator
) -> tuple[float | None, float | None]:
    """Return the p-value of the distance, and the standard deviation of the log rate where the cut was chosen.

    Clauset et al., section 4.1: samples of the fitted law above `v_min`, and of the values themselves below it.
    """
    if not resamples:
        return None, None
    share = 1 - tail.start / len(logs)
    further, rates = 0, []
    for _ in tqdm(range(resamples), desc="power law", delay=3, leave=False, disable=processes()[0] != 0):
        inside = max(_FEWEST, rng.binomial(len(logs), share))
        below = rng.choice(logs[: tail.start], len(logs) - inside) if tail.start else np.empty(0)
        sample = np.concatenate([np.sort(below), np.sort(tail.cut + rng.exponential(1 / tail.rate, inside))])
        further += _fit_tail(sample, cut).distance >= tail.distance
        if cut is None:
            rates.append(_fit_tail(logs[np.sort(rng.integers(len(logs), size=len(logs)))], None).rate)
    # The values count as a sample too: without the ones, any number of samples could give a p-value of 0.
    return (further + 1) / (resamples + 1), float(np.log(rates).std()) if rates else None


def _interval(rate: float, count: int, spread: float | None) -> tuple[float, float]:
    """Return the 95% interval of the rate; for a given `v_min` a sum of exponential variables is a gamma variable."""
    if spread is not None:
        return rate * float(np.exp(-_DEVIATIONS * spread)), rate * float(np.exp(_DEVIATIONS * spread))
    low, high = stats.gamma.ppf([0.025, 0.975], count) * rate / count
    return float(low), float(high)


def _against_exponential(excess: np.ndarray, rate: float) -> Comparison:
    growth = np.expm1(excess)  # v / v_min - 1
    other = -np.log(growth.mean()) - growth / growth.mean() + excess  # a density of y, hence the last term
    difference = np.log(rate) - rate * excess - other
    spread = np.sqrt(2 * len(difference) * difference.var())
    return Comparison(float(difference.sum()), float(special.erfc(abs(difference.sum()) / spread)) if spread else 1.0)


def _against_log_normal(excess: np.ndarray, rate: float) -> Comparison:
    """Compare with a normal of y cut off at 0, an exponential family, whose fit follows from the moments of y."""
    ratio = (excess**2).mean() / excess.mean() ** 2
    nearest, furthest = 1e3, -1e6
    if ratio >= _moment_ratio(nearest):  # 2 in the limit, the power law itself
        return Comparison(0.0, 1.0)
    ratio = max(ratio, _moment_ratio(furthest))
    cut = optimize.brentq(lambda cut: _moment_ratio(cut) - ratio, furthest, nearest)
    deviation = excess.mean() / (_hazard(cut) - cut)
    scaled = excess / deviation + cut
    other = stats.norm.logpdf(scaled) - np.log(deviation) - special.log_ndtr(-cut)
    log_ratio = min(0.0, float((np.log(rate) - rate * excess - other).sum()))
    return Comparison(log_ratio, float(stats.chi2.sf(-2 * log_ratio, 1) / 2))


def _moment_ratio(cut: float) -> float:
    """Return E[y^2] / E[y]^2 of y = z - cut, z standard normal above `cut`."""
    hazard = _hazard(cut)
    return (1 - cut * hazard + cut**2) / (hazard - cut) ** 2


def _hazard(cut: float) -> float:
    return float(np.sqrt(2 / np.pi) / special.erfcx(cut / np.sqrt(2)))


def _verdict(p_value: float | None, log_normal: Comparison, exponential: Comparison) -> str:
    rivals = {"log-normal": log_normal, "exponential": exponential}
    if any(rival.log_ratio < 0 and rival.p_value < _LEVEL for rival in rivals.values()):
        # By Akaike's criterion: a log-normal has a parameter more.
        return min(rivals, key=lambda name: rivals[name].log_ratio + (name == "log-normal"))
    if p_value is not None and p_value < _LEVEL:
        return "none"
    return "power law" if exponential.p_value < _LEVEL else "undecided"


def _fit_ranks(descending: np.ndarray, ranks: Sequence[int] | None) -> RankFit:
    total = len(descending)
    first, last = ranks if ranks is not None else (1, total)
    if not 1 <= first < last - 1 <= total - 1:
        raise ValueError(f"`ranks` must be three or more ranks between 1 and {total}, got ({first}, {last}).")
    logs, rank = descending[first - 1 : last], np.arange(first, last + 1)
    if logs[0] == logs[-1]:
        raise ValueError(f"The values of ranks {first} to {last} are all the same; choose other `ranks`.")
    line = stats.linregress(np.log(rank), logs)
    others = [stats.linregress(other, logs).rvalue ** 2 for other in (rank, special.ndtri((rank - 0.5) / total))]
    return RankFit((int(first), int(last)), float(-line.slope), float(line.rvalue**2), *map(float, others))
