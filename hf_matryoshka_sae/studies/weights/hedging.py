"""Feature hedging: how much a narrow dictionary mixes correlated features into its latents.

A dictionary too narrow for its data merges correlated features into one latent. When N latents are added and training
goes on, the features separate: the old rows move along the new ones. How far they move, beyond their movement along
random directions, is the hedging rate (Chanin et al. 2025, arXiv 2505.11756).
"""

from typing import Any

import torch
from torch import Tensor

from ...common.checks import check_at_least
from ...evaluation.geometry import unit_rows


@torch.no_grad()
def hedging_rate(control_W_dec: Tensor, extended_W_dec: Tensor, draws: int = 50, seed: int = 0) -> dict[str, Any]:
    """Compute the hedging rate of a dictionary from its decoder before and after N latents were added.

    With unit rows, delta_j the change of row j < h and Q the span of the N new rows,

        P = mean_j ||Q delta_j||,  P_0 = the same with N Gaussian rows, mean over draws
        rate = max(0, (P - P_0) / (1 - P_0))

    where the original divides P and P_0 by the mean length of the control's rows, which is 1 here.

    Args:
        control_W_dec (`Tensor` of shape `(h, D)`): Decoder of the control.
        extended_W_dec (`Tensor` of shape `(h + N, D)`):
            Decoder of the same dictionary after N latents were added behind its own and training went on.
        draws (`int`, *optional*, defaults to 50): Number of draws of the random rows of P_0.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `dict`: `hedging_rate`, `projection` (P), `random_projection` (P_0), its standard deviation over draws
        `random_projection_std`, `change` (mean of ||delta_j||), `width` (h), `added` (N).

    Raises:
        `ValueError`: for shapes that do not fit, rows of zeros, or as many new latents as there are dimensions.
    """
    width, d_in = _checked(control_W_dec, extended_W_dec)
    check_at_least(1, draws=draws)
    control, extended = control_W_dec.double().cpu(), extended_W_dec.double().cpu()
    for name, rows in (("control", control), ("extended", extended)):
        if not (rows.isfinite().all() and rows.any(1).all()):
            raise ValueError(f"The {name} decoder holds rows that are zero or not finite; they have no direction.")
    control, extended = unit_rows(control)[0], unit_rows(extended)[0]
    added = len(extended) - width
    change = extended[:width] - control
    generator = torch.Generator().manual_seed(seed)
    random = torch.stack(
        [_projection(change, torch.randn(added, d_in, generator=generator, dtype=change.dtype)) for _ in range(draws)]
    )
    projection, baseline = _projection(change, extended[width:]).item(), random.mean().item()
    return {
        # P_0 reaches 1 only where nothing is left of the old rows.
        "hedging_rate": max(0.0, (projection - baseline) / (1 - baseline)) if baseline < 1 else 0.0,
        "projection": projection,
        "random_projection": baseline,
        "random_projection_std": random.std(correction=0).item(),
        "change": change.norm(dim=1).mean().item(),
        "width": width,
        "added": added,
    }


def _checked(control: Tensor, extended: Tensor) -> tuple[int, int]:
    """Return h and D; raise `ValueError` where the two decoders do not fit."""
    if control.dim() != 2 or extended.dim() != 2 or control.shape[1] != extended.shape[1]:
        raise ValueError(
            f"Expected decoders (h, D) and (h + N, D), got {tuple(control.shape)} and {tuple(extended.shape)}."
        )
    width, d_in = control.shape
    if not 0 < len(extended) - width < d_in:
        raise ValueError(
            f"The extended decoder needs from 1 to {d_in - 1} rows more than the control's {width}, got "
            f"{len(extended)} rows: {d_in} new rows or more span everything, and every change lies in their span."
        )
    return width, d_in


def _projection(change: Tensor, rows: Tensor) -> Tensor:
    """Return the mean length of the changes' projections on the span of `rows`, which may be linearly dependent."""
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[singular > singular[0] * 1e-10]
    return (change @ basis.T).norm(dim=1).mean()
