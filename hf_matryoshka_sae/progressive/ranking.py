"""Rankings of latents by importance, and the dictionary in their order.

For every permutation P of the latents `sigma((x - b) W_enc P + b_enc P) P^T W_dec + b` is the same reconstruction, so
sorting costs nothing at full width and decides what the first n latents are (Peter & Søgaard 2025, arXiv 2505.00190).
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from ..evaluation.data import HasActivations
from ..models import SAEModel
from ..models.configuration_sae import nearest
from .greedy import greedy_order
from .statistics import LatentStatistics, check_places, decoder_rows, latent_statistics


_FIELDS = {
    "energy": "mean_square",
    "frequency": "frequency",
    "contribution": "contribution",
    "leave_one_out": "leave_one_out",
    "attribution": "attribution",
}
"""Rankings by a field of [`LatentStatistics`]."""

RANKINGS = (*_FIELDS, "greedy", "decoder-spectrum", "random", "trained")
"""The names `rank_latents` knows."""

MAY_NEED_ACTIVATIONS = (*_FIELDS, "greedy")
"""Rankings that read data: `greedy` always, the others unless there are statistics."""


def rank_latents(
    sae: SAEModel,
    by: str = "energy",
    statistics: LatentStatistics | None = None,
    activations: HasActivations | Iterable[Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """Return an order of all latents by their importance, across all prefixes.

    - `"energy"`: `E[a^2]`; `"contribution"`: `E[(a ||d||)^2]`, the same where decoder rows have length 1.
    - `"frequency"`: share of tokens on which the latent fires.
    - `"leave_one_out"`: growth of the squared error where the latent alone is left out.
    - `"attribution"`: `E|a dL/da|`, the latent's effect on the language model's loss to first order.
    - `"greedy"`: forward selection on the squared error, see [`greedy_order`].
    - `"decoder-spectrum"`: `d^T C d` with C the covariance of the decoder rows; needs no data. Latents that point
      where the dictionary spreads most come first; how often they fire plays no part.
    - `"random"`: by `seed`, a baseline; `"trained"`: as they are.

    Args:
        sae ([`SAEModel`]): An SAE of any family.
        by (`str`, *optional*, defaults to `"energy"`): One of `RANKINGS`.
        statistics ([`LatentStatistics`], *optional*): Statistics of this SAE.
        activations ([`HeldOut`] or an iterable of `(n, D)` tensors, *optional*): Raw hidden states on which
            statistics are measured, where there are none.
        seed (`int`, *optional*, defaults to 0): Seed of `"random"`.

    Returns:
        `Tensor` of shape `(F,)`: places of the latents, most important first, int64 on the CPU. Ties keep their order.

    Raises:
        `ValueError`: if the ranking is unknown, it lacks statistics or data, or the statistics are of another SAE.
    """
    return _ranked(sae, by, statistics, activations, seed, None)


def sort_latents(
    sae: SAEModel,
    by: str = "energy",
    statistics: LatentStatistics | None = None,
    activations: HasActivations | Iterable[Tensor] | None = None,
    order: Tensor | None = None,
    across_groups: bool = False,
    seed: int = 0,
) -> SAEModel:
    """Return a copy of an SAE with its latents sorted, most important first.

    At full width it computes what the SAE does, up to the order in which terms are added; `latent_ids` go along.
    (Where TopK meets two equal pre-activations, the one that now comes first is kept.)

    Args:
        sae ([`SAEModel`]): An SAE of any family; the copy is of the same class.
        by (`str`, *optional*, defaults to `"energy"`): One of `RANKINGS`, see [`rank_latents`].
        statistics ([`LatentStatistics`], *optional*): Statistics of this SAE.
        activations ([`HeldOut`] or an iterable of `(n, D)` tensors, *optional*): Raw hidden states on which
            statistics are measured, where there are none.
        order (`Tensor` of shape `(F,)`, *optional*): Places of the latents, most important first, instead of `by`.
        across_groups (`bool`, *optional*, defaults to `False`): A Matryoshka SAE is sorted within the groups between
            its prefix widths, so that each prefix holds the latents it was trained with. `True` sorts all latents at
            once: its inner prefixes are then those of the ranking, no longer those of the training.
        seed (`int`, *optional*, defaults to 0): Seed of `"random"`.

    Returns:
        [`SAEModel`]. `statistics.select(order)` are its statistics.

    Raises:
        `ValueError`: as in [`rank_latents`], or if `order` is no permutation of all latents.
    """
    order = sorting_order(sae, by, statistics, activations, order, across_groups, seed)
    sorted_sae = copy.deepcopy(sae)
    sorted_sae.permute_(order.to(sae.W_dec.device))
    return sorted_sae


def sorting_order(
    sae: SAEModel,
    by: str = "energy",
    statistics: LatentStatistics | None = None,
    activations: HasActivations | Iterable[Tensor] | None = None,
    order: Tensor | None = None,
    across_groups: bool = False,
    seed: int = 0,
) -> Tensor:
    """Return the order `(F,)` in which [`sort_latents`], with the same arguments, puts the latents."""
    widths = None if across_groups else sae.prefix_widths
    if order is None:
        return _ranked(sae, by, statistics, activations, seed, widths)
    order = check_places(order, sae.config.num_latents)
    if len(order) != sae.config.num_latents:
        raise ValueError(f"`order` must hold all {sae.config.num_latents} latents once, got {len(order)} of them.")
    return _within_groups(order, widths)


def _ranked(
    sae: SAEModel,
    by: str,
    statistics: LatentStatistics | None,
    activations: HasActivations | Iterable[Tensor] | None,
    seed: int,
    widths: list[int] | None,
) -> Tensor:
    """Return an order of all latents; with `widths`, those of a narrower prefix come before all others."""
    if by not in RANKINGS:
        raise ValueError(f"Unknown ranking {by!r}.{nearest(by, RANKINGS)}")
    if by == "greedy":
        if activations is None:
            raise ValueError("Ranking by 'greedy' needs `activations`: statistics of single latents are not enough.")
        return greedy_order(sae, activations, widths).order
    if by in ("random", "trained"):
        latents = sae.config.num_latents
        generator = torch.Generator().manual_seed(seed)
        order = torch.arange(latents) if by == "trained" else torch.randperm(latents, generator=generator)
    else:
        scores = _decoder_spectrum(sae) if by == "decoder-spectrum" else _scores(sae, by, statistics, activations)
        order = scores.sort(descending=True, stable=True).indices
    return _within_groups(order, widths)


def _within_groups(order: Tensor, widths: list[int] | None) -> Tensor:
    """Return the same ranking, group by group."""
    if widths is None or len(widths) == 1:
        return order
    groups = torch.bucketize(order, torch.tensor(widths), right=True)
    return order[groups.sort(stable=True).indices]


def _scores(
    sae: SAEModel,
    by: str,
    statistics: LatentStatistics | None,
    activations: HasActivations | Iterable[Tensor] | None,
) -> Tensor:
    if statistics is None:
        if activations is None:
            raise ValueError(
                f"Ranking by {by!r} needs `statistics` of the SAE or `activations` to measure them on. Without data "
                "there are 'decoder-spectrum', 'random' and 'trained'."
            )
        statistics = latent_statistics(sae, activations, neighbours=0, attribution=by == "attribution")
    statistics.check(sae)
    scores = getattr(statistics, _FIELDS[by])
    if scores is None:
        raise ValueError("These statistics hold no attribution. Measure them with `attribution=True` on a `HeldOut`.")
    return scores


def _decoder_spectrum(sae: SAEModel) -> Tensor:
    """Return `d^T C d` with `C = 1/F sum (d - mean)^T (d - mean)`."""
    rows = decoder_rows(sae).double()
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    return ((rows @ covariance) * rows).sum(1).cpu()
