"""The share of latents that hardly ever fire, in one unit whatever the sample: on less than one token in a million.

The share of latents that never fire depends on how many tokens were looked at: of one SAE .4% of 60,000, 11% of
10,000, 31% of 4,000. Here rates of firing are taken to follow a normal distribution of their logarithms with a width
of its own on either side of the middle, beside a share of latents that are dead; counts are Poisson. The widths, the
middle and the share are those of largest likelihood, and the share below the limit follows, extrapolated where the
sample is smaller than a million tokens. The interval is over resamples of the latents; it says nothing of whether the
distribution has that form.

    L = sum over latents of log( d [count = 0] + (1 - d) sum over r of p(r) Poisson(count; n r) )

Shapes: F latents, R rates.
"""

import numpy as np

from ..common.intervals import middle_95, resampled_counts


LIMIT = 1e-6
_RATES = np.logspace(-9, 0, 109)
_START = (-3.0, 0.8, 0.6, 0.01)


def rare_share(
    fired: np.ndarray, tokens: int, limit: float = LIMIT, resamples: int = 20, seed: int = 0
) -> tuple[float, list[float] | None]:
    """Return the share of latents that fire on less than `limit` of tokens, and its 95% interval.

    Args:
        fired (`np.ndarray` of shape `(F,)`): On how many tokens each latent fires.
        tokens (`int`): How many were looked at.
        limit (`float`, *optional*, defaults to 1e-6): The rate.
        resamples (`int`, *optional*, defaults to 20): Of the interval, a bootstrap over latents; 0 for none.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """
    counts, members = np.unique(_rounded(np.asarray(fired)), return_counts=True)
    likelihood = _likelihoods(counts, tokens)
    point, share = _fit(likelihood, members, limit, None)
    if not resamples or len(fired) < 8:
        return share, None
    drawn = resampled_counts(len(fired), resamples, np.random.default_rng(seed))
    group = np.repeat(np.arange(len(counts)), members)
    samples = [_fit(likelihood, np.bincount(group, one, len(counts)), limit, point)[1] for one in drawn]
    low, high = middle_95(np.array(samples))
    return share, [min(low, share), max(high, share)]


def _rounded(fired: np.ndarray) -> np.ndarray:
    """Return counts with large ones to two digits, so that there are few different ones."""
    unit = 10 ** np.floor(np.log10(np.maximum(fired, 10)) - 1)
    return np.where(fired < 30, fired, np.round(fired / unit) * unit).astype(np.int64)


def _likelihoods(counts: np.ndarray, tokens: int) -> np.ndarray:
    """Return the probability of each count at each rate `(C, R)`, and last, at a rate of 0."""
    from scipy.stats import poisson

    return np.concatenate([poisson.pmf(counts[:, None], tokens * _RATES), (counts == 0)[:, None]], axis=1)


def _fit(
    likelihood: np.ndarray, members: np.ndarray, limit: float, start: np.ndarray | None
) -> tuple[np.ndarray, float]:
    from scipy.optimize import minimize

    logs = np.log10(_RATES)

    def prior(point: np.ndarray) -> np.ndarray:
        middle, left, right, dead = point
        z = (logs - middle) / np.where(logs < middle, left, right)
        weights = np.exp(-0.5 * z * z)
        return np.append((1 - dead) * weights / weights.sum(), dead)

    def loss(point: np.ndarray) -> float:
        return -(members * np.log(likelihood @ prior(point) + 1e-300)).sum() / members.sum()

    bounds = [(-7, -0.3), (0.05, 3), (0.05, 3), (0, 1)]
    options = {"maxiter": 200 if start is None else 40}
    begin = np.array(_START) if start is None else start
    point = minimize(loss, begin, method="L-BFGS-B", bounds=bounds, options=options).x
    weights = prior(point)
    return point, float(weights[:-1][limit > _RATES].sum() + weights[-1])
