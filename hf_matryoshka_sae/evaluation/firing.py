"""How often and how strongly latents fire: sums over batches, and L0, L1 and dead share of every prefix."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..common.distributed import reduce_sum
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs


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
