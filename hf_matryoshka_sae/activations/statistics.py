"""Mean and scale of hidden states, accumulated in float64 and summed over processes.

With `mean` and `scale` of a hookpoint, `(x - mean) / scale` has zero mean and `E||(x - mean) / scale||^2 = D`: its
coordinates have variance 1 on average, whatever the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .states import RowStream


@dataclass
class ActivationStatistics:
    """Mean and scale of a hookpoint's hidden states.

    Args:
        mean (`Tensor`): mean of x, `[D]`, float32.
        scale (`float`): root mean square of the coordinates of x - mean, in the units of x.
        outlier_ratio (`float`): largest |mean| / standard deviation over coordinates. Far above 1, a few coordinates
            are large constants, and training without subtracting the mean spends latents on them.
    """

    mean: Tensor
    scale: float
    outlier_ratio: float


@torch.no_grad()
def estimate_statistics(
    stream: RowStream | Iterable[dict[str, Tensor]], tokens: int
) -> dict[str, ActivationStatistics]:
    """Return statistics of each hookpoint, over all processes if `torch.distributed` is initialised.

    Args:
        stream ([`RowStream`] or batches of rows): rows to measure. Those of a stream are not used up, so that they are
            trained on as well; at most what its buffer holds is measured.
        tokens (`int`): rows to measure, in this process.

    Returns:
        `dict[str, ActivationStatistics]`: by hookpoint, the mean on the rows' device.

    Raises:
        `ValueError`: a hookpoint has no finite row, or its rows are all the same.
    """
    batches = stream.peek(tokens) if hasattr(stream, "peek") else _first(stream, tokens)
    moments: dict[str, _Moments] = {}
    for batch in batches:
        for hookpoint, rows in batch.items():
            if hookpoint not in moments:
                moments[hookpoint] = _Moments(rows)
            moments[hookpoint].add(rows)
    if not moments:
        raise ValueError("There are no hidden states to measure: the stream is empty.")
    return {hookpoint: sums.statistics(hookpoint) for hookpoint, sums in moments.items()}


class _Moments:
    """Count, sum and sum of squares of finite rows: `sums` is `[2 D + 1]`, so that one all-reduce does."""

    def __init__(self, rows: Tensor) -> None:
        self.sums = torch.zeros(2 * rows.shape[1] + 1, dtype=torch.float64, device=rows.device)

    def add(self, rows: Tensor) -> None:
        finite = rows.isfinite().all(1)
        # Zeros instead of a selection: how many rows are finite stays on the device.
        rows = rows.double().masked_fill(~finite[:, None], 0)
        self.sums += torch.cat([rows.sum(0), rows.square().sum(0), finite.sum()[None]])

    def statistics(self, hookpoint: str) -> ActivationStatistics:
        sums = self.sums
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        count = sums[-1].item()
        if count == 0:
            raise ValueError(
                f"No hidden state at '{hookpoint}' is finite. Load the model in another type (bfloat16 or float32),"
                " or choose another hookpoint."
            )
        mean, square = sums[:-1].view(2, -1) / count
        variance = (square - mean.square()).clamp_min(0)
        scale = variance.mean().sqrt().item()
        varies = variance > 1e-12 * square  # below lies rounding: a constant coordinate
        if not varies.any():
            raise ValueError(f"The hidden states at '{hookpoint}' do not vary; choose another hookpoint.")
        ratio = (mean[varies].abs() / variance[varies].sqrt()).max().item()
        return ActivationStatistics(mean.float(), scale, ratio)


def _first(batches: Iterable[dict[str, Tensor]], tokens: int) -> Iterable[dict[str, Tensor]]:
    for batch in batches:
        if tokens <= 0:
            return
        yield {hookpoint: rows[:tokens] for hookpoint, rows in batch.items()}
        tokens -= len(next(iter(batch.values())))
