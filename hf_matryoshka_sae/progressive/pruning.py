"""Pruning a trained SAE: merge near-duplicates, sort the rest, cut the tail, refit the bias."""

import logging
from collections.abc import Iterable

from torch import Tensor

from ..evaluation.data import HasActivations
from ..models import SAEModel
from .budget import Budget, width_for_budget
from .merging import merge_latents
from .ranking import MAY_NEED_ACTIVATIONS, sort_latents
from .refining import refined
from .refit import check_rereadable
from .refit import refit as refit_sae
from .statistics import LatentStatistics, latent_statistics


logger = logging.getLogger(__name__)


def prune(
    sae: SAEModel,
    width: int | None = None,
    by: str = "energy",
    statistics: LatentStatistics | None = None,
    activations: HasActivations | Iterable[Tensor] | None = None,
    merge: float | None = None,
    refit: bool = False,
    order: Tensor | None = None,
    budget: str | Budget | None = None,
) -> SAEModel:
    """Return an SAE of the `width` most important latents, or of as many as a budget needs.

    The result is `sort_latents(...).truncate(width)`: its latents are sorted, `latent_ids` say which they were, and at
    `width = F` it computes what the SAE does. Pruned latents are never encoded, so with TopK the others compete for k
    places ("restrict"; k is capped at the width). A Matryoshka SAE is sorted within its groups: prefixes narrower than
    `width` keep their latents, and of the group that is cut the most important stay.

    Args:
        sae ([`SAEModel`]): An SAE of any family, which is not changed.
        width (`int`, *optional*): Number of latents to keep; give this or a `budget`.
        by (`str`, *optional*, defaults to `"energy"`): Ranking of the latents, see [`rank_latents`].
        statistics ([`LatentStatistics`], *optional*): Statistics of this SAE.
        activations ([`HeldOut`] or an iterable of `(n, D)` tensors, *optional*): Raw hidden states, where there are no
            statistics, and for refitting. Each of these steps reads them once, so that an iterator allows only one.
        merge (`float`, *optional*): Merge near-duplicates above this decoder cosine first, as long as more than
            `width` latents remain; see [`merge_latents`].
        refit (`bool`, *optional*, defaults to `False`): Fit the bias to what is left, and with BatchTopK the
            thresholds to k latents per token, see [`refit`]; L0 and FVU before and after are logged. Call [`refit`] on
            the result for the decoder, or for the figures.
        order (`Tensor` of shape `(F,)`, *optional*): Places of the latents, most important first, instead of `by`; not
            with `merge`.
        budget (`str` or [`Budget`], *optional*): A budget such as `"keep 95% of recaptured loss"`, `"FVU at most
            0.2"` or `"at most 50 MB"`, see [`width_for_budget`]; measured on `activations`, before refitting.

    Returns:
        [`SAEModel`] of the same class.

    Raises:
        `ValueError`: if the width is out of range, data that are needed were not given, or as in [`rank_latents`].
    """
    _check(sae, width, by, budget, statistics, activations, merge, refit, order)
    if merge is not None:
        if statistics is None and activations is not None:
            statistics = latent_statistics(sae, activations, attribution=by == "attribution")
        most = sae.config.num_latents - (width or 1)
        merged = merge_latents(sae, merge, statistics, most=most)
        logger.info("Merged %d pairs of latents with a decoder cosine above %g.", len(merged.pairs), merge)
        sae = merged.sae
        # Statistics of merged latents are estimates: they are measured anew where there are data.
        statistics = merged.statistics if activations is None else None
    ordered = sort_latents(sae, by, statistics, activations, order)
    if budget is not None:
        width = width_for_budget(ordered, budget, activations)
        logger.info("%d of %d latents keep the budget %s.", width, sae.config.num_latents, budget)
    pruned = ordered.truncate(width)
    if refit:
        config, k = pruned.config, getattr(pruned.config, "k", None)
        l0 = min(k, width) if config.activation_name == "batch_topk" else None
        # Thresholds that go with refined codes are set last: they hang on the bias.
        result = refit_sae(pruned, activations, l0=None if config.refine_steps else l0)
        logger.info(
            "Refitted %d latents: L0 %.2f -> %.2f, FVU %.4f -> %.4f on %d %s tokens.",
            width,
            result.l0_before,
            result.l0_after,
            result.fvu_before,
            result.fvu_after,
            result.tokens,
            "held-out" if result.held_out else "fitted",
        )
        pruned = result.sae
        if config.refine_steps and l0 is not None:
            pruned = refined(pruned, activations, config.refine_steps, config.refine_step_size, l0=l0)
    return pruned


def _check(
    sae: SAEModel,
    width: int | None,
    by: str,
    budget: str | Budget | None,
    statistics: LatentStatistics | None,
    activations: HasActivations | Iterable[Tensor] | None,
    merge: float | None,
    refit: bool,
    order: Tensor | None,
) -> None:
    if (width is None) == (budget is None):
        raise ValueError("Give either a `width` or a `budget`, for example budget='FVU at most 0.2'.")
    if isinstance(budget, str):
        Budget.parse(budget)  # raises for a sentence that cannot be read, before anything is measured
    if budget is not None and activations is not None:
        check_rereadable(activations, "Finding the width for a budget")
    if width is not None and not 1 <= width <= sae.config.num_latents:
        raise ValueError(f"`width` must lie between 1 and num_latents ({sae.config.num_latents}), got {width}.")
    if merge is not None and order is not None:
        raise ValueError("Merging changes which latents there are: give `merge` or an `order`, not both.")
    if refit and activations is None:
        raise ValueError("Refitting needs `activations`: statistics of latents hold no residuals.")
    if refit and sae.config.refine_steps:
        check_rereadable(activations, "Refitting an SAE with `refine_steps`")
    measures = by in MAY_NEED_ACTIVATIONS and order is None
    ranking = measures and activations is not None and (statistics is None or by == "greedy" or merge is not None)
    passes = refit + ranking + (merge is not None and statistics is None and activations is not None)
    if passes > 1:
        check_rereadable(activations, "This pruning")
