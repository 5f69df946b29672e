"""How often and how strongly latents fire: sums over batches, L0, L1 and dead share of every prefix, and rare latents.

The share of latents that never fire depends on how many tokens were looked at: of one SAE .4% of 60,000, 11% of
10,000, 31% of 4,000. Here rates of firing are taken to follow a normal distribution of their logarithms with a width
of its own on either side of the middle, beside a share of latents that are dead; counts are Poisson. The widths, the
middle and the share are those of largest likelihood, and the share below the limit follows, extrapolated where the
sample is smaller than a million tokens. The interval holds every share of dead latents at which the likelihood is not
smaller than 1 / 6.8 of the largest (95%, profile likelihood): of few tokens a dead latent cannot be told from a rare
one, and the interval is wide. It says nothing of whether the distribution has that form.

    L = sum over latents of log( d [count = 0] + (1 - d) sum over r of p(r) Poisson(count; n r) )

Shapes: F latents, R rates.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..common.distributed import reduce_sum
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs


LIMIT = 1e-6
_RATES = np.logspace(-9, 0, 109)
_START = (-3.0, 0.8, 0.6)
_BOUNDS = [(-7, -0.3), (0.05, 3), (0.05, 3)]
_DROP = 1.92  # nats: half of the 95% point of chi-squared with one degree of freedom
_TRIED = 9  # shares of dead latents


def add_moments(moments: Tensor, cols: Tensor, values: Tensor) -> None:
    """Add values and their squares, `(M,)`, to the sums `(2, F)` of the latents that they are of."""
    values = values.double()
    for row, powers in enumerate((values, values.square())):
        moments[row] += torch.bincount(cols, powers, moments.shape[1]).to(moments.device)


@torch.no_grad()
def firings_of(sae: SAEModel, states: Iterable[Tensor]) -> "FiringSums":
    """Return the firings of an SAE in `eval` mode on hidden states, `(n, D)` each, of this process alone."""
    sums = FiringSums(sae.config.num_latents, sae.W_enc.device)
    for x in states:
        sums.add(sae.encode_pairs(x.to(sae.W_enc)))
    return sums


class FiringSums:
    """Counts per latent, from which those of every prefix follow: a prefix drops latents and changes no value.

    Args:
        num_latents (`int`): F.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Device of the sums.

    Attributes:
        tokens (`Tensor` of shape `()`): Number of tokens.
        fired (`Tensor` of shape `(F,)`): Number of tokens on which each latent fires.
        moments (`Tensor` of shape `(2, F)`): Sums of each latent's values and of their squares, float64.
    """

    def __init__(self, num_latents: int, device: torch.device | str = "cpu") -> None:
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.moments = torch.zeros(2, num_latents, dtype=torch.float64, device=device)

    @property
    def total(self) -> Tensor:
        """Return the sum of each latent's values, `(F,)`."""
        return self.moments[0]

    @torch.no_grad()
    def add(self, pairs: LatentPairs) -> None:
        """Count the latents of a batch; a latent fires where its value is above 0."""
        active = pairs.values > 0
        cols, values = pairs.cols[active], pairs.values[active]
        self.tokens += pairs.num_rows
        self.fired += torch.bincount(cols, minlength=len(self.fired)).to(self.fired.device)
        add_moments(self.moments, cols, values)

    def reduce(self) -> "FiringSums":
        """Return the counts of all processes."""
        reduce_sum(self.tokens, self.fired, self.moments)
        return self

    @property
    def frequency(self) -> Tensor:
        """Return the share of tokens on which each latent fires, `(F,)`."""
        return self.fired.double() / self.tokens

    def rows(self, widths: Sequence[int]) -> list[dict[str, float]]:
        """Return `l0` (latents that fire per token), `l1` (sum of their values) and `dead` (share never firing)."""
        rows = []
        for width in widths:
            fired = self.fired[:width]
            rows.append(
                {
                    "l0": (fired.sum() / self.tokens).item(),
                    "l1": (self.total[:width].sum() / self.tokens).item(),
                    "dead": (fired == 0).double().mean().item(),
                }
            )
        return rows


def rare_share(fired: np.ndarray, tokens: int, limit: float = LIMIT) -> tuple[float, list[float] | None]:
    """Return the share of latents that fire on less than `limit` of tokens, and its 95% interval.

    Args:
        fired (`np.ndarray` of shape `(F,)`): On how many tokens each latent fires.
        tokens (`int`): How many were looked at.
        limit (`float`, *optional*, defaults to 1e-6): The rate.

    Returns:
        The share, and the ends of its interval; `None` of fewer than eight latents.
    """
    counts, members = np.unique(_rounded(np.asarray(fired)), return_counts=True)
    likelihood = _likelihoods(counts, tokens)
    never = float(members[counts == 0].sum() / members.sum())
    tried: list[tuple[float, float, float]] = []
    grid = never * np.linspace(0, 1, _TRIED) ** 1.5
    for _ in range(2):
        start = np.array(_START)
        for dead in np.unique(grid):
            loss, share, start = _fit(likelihood, members, dead, limit, start)
            tried.append((loss, share, dead))
        best = min(tried)[2]  # then more closely around the best, as far as its neighbours
        below, above = (grid[grid < best][-1:], grid[grid > best][:1])
        grid = np.linspace(*(float(end[0]) if len(end) else best for end in (below, above)), _TRIED)
    least, share, _ = min(tried)
    shares = [each for loss, each, _ in tried if loss <= least + _DROP]
    return share, None if len(fired) < 8 else [min(shares), max(shares)]


def _rounded(fired: np.ndarray) -> np.ndarray:
    """Return counts with large ones to two digits, so that there are few different ones."""
    unit = 10 ** np.floor(np.log10(np.maximum(fired, 10)) - 1)
    return np.where(fired < 30, fired, np.round(fired / unit) * unit).astype(np.int64)


def _likelihoods(counts: np.ndarray, tokens: int) -> np.ndarray:
    """Return the probability of each count at each rate `(C, R)`, and last, at a rate of 0."""
    from scipy.stats import poisson

    return np.concatenate([poisson.pmf(counts[:, None], tokens * _RATES), (counts == 0)[:, None]], axis=1)


def _fit(
    likelihood: np.ndarray, members: np.ndarray, dead: float, limit: float, start: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Return the least loss in nats with a share of dead latents, the share below the limit, and middle and widths."""
    from scipy.optimize import minimize

    logs = np.log10(_RATES)

    def prior(point: np.ndarray) -> np.ndarray:
        middle, left, right = point
        z = (logs - middle) / np.where(logs < middle, left, right)
        weights = np.exp(-0.5 * z * z)
        return np.append((1 - dead) * weights / weights.sum(), dead)

    def loss(point: np.ndarray) -> float:
        return -(members * np.log(likelihood @ prior(point) + 1e-300)).sum() / members.sum()

    found = minimize(loss, start, method="L-BFGS-B", bounds=_BOUNDS, options={"maxiter": 100})
    share = float(prior(found.x)[:-1][limit > _RATES].sum() + dead)
    return float(found.fun * members.sum()), share, found.x
