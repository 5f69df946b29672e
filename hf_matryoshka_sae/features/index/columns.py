"""Compute the columns of the index from the sums of a pass."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from ...models import SAEModel
from ...progressive.statistics import nearest_latents
from ..bands import EDGES, BandSample, band_of
from ..logits import logit_effects
from ..sizes import IndexSizes
from .best import Best, key_positions, key_values
from .cofiring import TokenSample
from .contexts import Contexts
from .latent_pass import LatentPass, Tree
from .layout import BAND, BAND_KIND, CONTEXT_SCHEMA, CONTEXTS, LATENTS_PER_GROUP, TOP, fingerprints, list_column
from .sums import LatentSums


def latent_columns(
    sae: SAEModel,
    model: nn.Module,
    latent_pass: LatentPass,
    sizes: IndexSizes,
) -> tuple[dict[str, Any], str | None]:
    """Return the columns of `latents.parquet`, and why there are no logit effects (`None` where there are)."""
    sums = latent_pass.sums
    firings, tokens = sums.firings(), int(sums.tokens)
    alive = firings.cpu().numpy() > 0
    largest = largest_of(latent_pass.contexts)
    quantiles = sums.quantiles(largest).float().cpu().numpy()
    mean, mean_square = (sums.moments / max(tokens, 1)).float().cpu().numpy()
    columns = {
        "latent": np.arange(len(alive), dtype=np.int32),
        "latent_id": sae.latent_ids.cpu().numpy(),
        "count": firings.cpu().numpy(),
        "frequency": (firings.double() / max(tokens, 1)).float().cpu().numpy(),
        "mean": mean,
        "mean_square": mean_square,
        "max": largest.cpu().numpy(),
        "first_position_share": sums.first_position_share().float().cpu().numpy(),
        "fingerprint": fingerprints(sae),
        "quantiles": list_column(quantiles, np.repeat(alive[:, None], quantiles.shape[1], 1)),
        **_histograms(sums.counts),
        **_cofiring(latent_pass.cofiring, sizes.cofiring),
        **_neighbours(sae, sizes.neighbours),
        **_relations(latent_pass.tree, len(alive)),
        **_bands(latent_pass.bands, sums, largest),
    }
    logits, why = _logits(sae, model, sizes.tokens_of_vocabulary)
    return columns | logits, why


def largest_of(contexts: Contexts) -> Tensor:
    """Return the largest activation of each latent, `(F,)`, 0 for dead ones."""
    return key_values(contexts.top.keys.amax(1).clamp(min=0))


def _histograms(counts: Tensor) -> dict[str, Any]:
    """Return each latent's counts from its first to its last filled bin, and the number of the first."""
    counts = counts.cpu().numpy()
    filled = counts > 0
    any_filled = filled.any(1)
    first = np.where(any_filled, filled.argmax(1), 0)
    end = np.where(any_filled, counts.shape[1] - filled[:, ::-1].argmax(1), 0)
    places = np.arange(counts.shape[1])
    inside = (places >= first[:, None]) & (places < end[:, None])
    return {"histogram_start": first.astype(np.int16), "histogram": list_column(counts, inside)}


def _cofiring(cofiring: TokenSample, count: int) -> dict[str, Any]:
    latents, rates = (part.cpu().numpy() for part in cofiring.strongest(count))
    inside = latents >= 0
    return {
        "cofiring": list_column(latents.astype(np.int32), inside),
        "cofiring_rates": list_column(rates.astype(np.float32), inside),
    }


def _neighbours(sae: SAEModel, count: int) -> dict[str, Any]:
    near = nearest_latents(sae, count)
    rows = nn.functional.normalize(sae.W_dec.detach().float(), dim=1).cpu()
    cosines = torch.stack(
        [torch.einsum("fd,fd->f", rows, rows[column]) for column in near.T] or [torch.zeros(0)]
    ).T.reshape(near.shape)
    return {
        "neighbours": list_column(near.int()),
        "neighbour_cosines": list_column(cosines),
    }


def _logits(sae: SAEModel, model: nn.Module, count: int) -> tuple[dict[str, Any], str | None]:
    names = ("promoted", "promoted_logits", "suppressed", "suppressed_logits")
    nothing = {name: [None] * len(sae.latent_ids) for name in names}
    if count == 0:
        return nothing, "left out: not asked for"
    try:
        effects = logit_effects(sae, model, count)
    except ValueError as error:
        return nothing, f"left out: {error}"
    columns = {}
    for name in names:
        rows = getattr(effects, name)
        columns[name] = list_column(rows if rows.is_floating_point() else rows.int())
    return columns, None


def _relations(tree: Tree | None, num_latents: int) -> dict[str, Any]:
    """Return each latent's parent, its children in ascending order, and candidates for its parent, best first."""
    if tree is None:
        parents, scores = np.full(num_latents, -1), np.zeros(num_latents, np.float32)
    else:
        parents, scores = (part.cpu().numpy() for part in tree.parents())
    order = np.argsort(parents, kind="stable")
    order = order[parents[order] >= 0]
    candidates = tree.candidates() if hasattr(tree, "candidates") else [torch.zeros(0)] * 3
    child, candidate, score = (part.cpu().numpy() for part in candidates)
    return {
        "parent": parents.astype(np.int32),
        "parent_score": np.where(parents >= 0, scores, 0).astype(np.float32),
        "children": _grouped(parents[order], order.astype(np.int32), num_latents),
        "candidates": _grouped(child, candidate.astype(np.int32), num_latents),
        "candidate_scores": _grouped(child, score.astype(np.float32), num_latents),
    }


def _grouped(latents: np.ndarray, values: np.ndarray, num_latents: int) -> pa.ListArray:
    """Return a column of lists from values sorted by the latent they belong to."""
    sizes = np.bincount(latents.astype(np.int64), minlength=num_latents)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], sizes.cumsum()]), pa.int32()), pa.array(values))


def _bands(sample: BandSample, sums: LatentSums, largest: Tensor) -> dict[str, Any]:
    """Return each latent's bands of activation, none for dead ones, and its most frequent own tokens."""
    firings = sums.firings_between(largest[:, None] * torch.tensor(EDGES, device=largest.device))
    precision, base, tokens = sample.precision(largest, firings)
    alive = np.repeat((largest.cpu().numpy() > 0)[:, None], firings.shape[1], 1)
    parts = [firings.cpu().numpy(), precision.float().numpy(), base.float()[:, None].expand(precision.shape).numpy()]
    values = [pa.array(part[alive], from_pandas=True) for part in parts]  # a NaN is null
    offsets = pa.array(np.concatenate([[0], alive.sum(1).cumsum()]), pa.int32())
    bands = pa.StructArray.from_arrays(values, fields=list(BAND))
    return {
        "bands": pa.ListArray.from_arrays(offsets, bands),
        "own_tokens": list_column(tokens.int(), (tokens >= 0).numpy()),
    }


def context_tables(contexts: Contexts, context_length: int, sizes: IndexSizes) -> Iterator[pa.Table]:
    """Yield the rows of `contexts.parquet`, one table for each row group."""
    top, sample, spread = (best.in_order() for best in (contexts.top, contexts.sample, contexts.spread))
    number = _quantile_numbers(sample, sizes.quantiles, sizes.quantile_contexts)
    kinds = [torch.where(top.keys >= 0, 0, -1), number + (number >= 0), torch.full_like(spread.keys, -1)]
    names = np.array([TOP, *(str(n) for n in range(sizes.quantiles)), BAND_KIND], dtype=object)
    _fill_bands([top, sample, spread], kinds, largest_of(contexts), sizes.band_contexts, len(names) - 1)
    for start in range(0, len(top.keys), LATENTS_PER_GROUP[CONTEXTS]):
        part = slice(start, start + LATENTS_PER_GROUP[CONTEXTS])
        each = zip((top, sample, spread), kinds, strict=True)
        parts = [_rows(best, start, kind[part], context_length) for best, kind in each]
        latents, kind, order = (np.concatenate(part) for part in zip(*(part[0] for part in parts), strict=True))
        table = pa.concat_tables([part[1] for part in parts])
        table = table.append_column("latent", pa.array(latents, pa.int32()))
        table = table.append_column("kind", pa.array(names[kind], pa.string()))
        yield table.select(CONTEXT_SCHEMA.names).take(np.lexsort((order, kind, latents))).cast(CONTEXT_SCHEMA)


def _fill_bands(parts: list[Best], kinds: list[Tensor], largest: Tensor, count: int, kind: int) -> None:
    """Give contexts without a kind this one, so that each band of activation has `count` contexts where there are."""
    keys, kinds_there = torch.cat([part.keys for part in parts], 1), torch.cat(kinds, 1)
    bands = torch.cat([band_of(_peak_values(part), largest[:, None]) for part in parts], 1)
    positions = key_positions(keys)
    later = torch.arange(keys.shape[1], device=keys.device)
    sizes = [part.keys.shape[1] for part in parts]
    # Those of the last part are spread over the bands, so they come before the random sample.
    order = torch.cat([later[: sizes[0]], later[sizes[0] + sizes[1] :], later[sizes[0] : sizes[0] + sizes[1]]])
    for place in order.tolist():
        same = (positions == positions[:, place, None]) & (kinds_there >= 0)
        full = ((bands == bands[:, place, None]) & (kinds_there >= 0)).sum(1) >= count
        chosen = (keys[:, place] >= 0) & (kinds_there[:, place] < 0) & ~same.any(1) & ~full
        kinds_there[chosen, place] = kind
    for old, new in zip(kinds, kinds_there.split(sizes, 1), strict=True):
        old.copy_(new)


def _peak_values(best: Best) -> Tensor:
    """Return the activation on the token that each context is around, `(F, n)`."""
    return best.payload["activations"].gather(2, best.payload["peak"].long()).squeeze(2)


def _quantile_numbers(sample: Best, quantiles: int, each: int) -> Tensor:
    """Return the quantile of each sampled context, `(F, R)`; -1 for those that are not kept.

    The sample of a latent is sorted by activation and cut into parts of equal size. Of each part the first few in
    the order of the random keys are kept.
    """
    there = sample.keys >= 0
    values = _peak_values(sample).masked_fill(~there, torch.inf)
    rank = values.argsort(dim=1, stable=True).argsort(dim=1)
    part = rank * quantiles // there.sum(1, keepdim=True).clamp(min=1)
    part = part.masked_fill(~there, -1)
    for number in range(quantiles):
        inside = part == number
        part = part.masked_fill(inside & (inside.cumsum(1) > each), -1)
    return part


def _rows(best: Best, start: int, kinds: Tensor, context_length: int) -> tuple[tuple[np.ndarray, ...], pa.Table]:
    """Return latent, kind and place of the entries that have a kind, and their columns."""
    latents, places = (kinds >= 0).nonzero(as_tuple=True)
    chosen = latents + start, places
    payload = {name: rows[chosen].cpu() for name, rows in best.payload.items()}
    positions = key_positions(best.keys[chosen]).cpu()
    peaks = payload["peak"].long()
    table = pa.table(
        {
            "token_ids": list_column(payload["token_ids"]),
            "activations": list_column(payload["activations"]),
            "peak": peaks.squeeze(1).numpy(),
            "value": payload["activations"].gather(1, peaks).squeeze(1).numpy(),
            "window": (positions // context_length).numpy(),
            "position": (positions % context_length).numpy(),
        }
    )
    return (chosen[0].cpu().numpy(), kinds[latents, places].cpu().numpy(), places.cpu().numpy()), table
