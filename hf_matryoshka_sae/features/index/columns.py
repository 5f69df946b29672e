"""Compute the columns of the index from the sums of a pass."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from ...models import SAEModel
from ...progressive.statistics import nearest_latents
from ..logits import logit_effects
from ..sizes import IndexSizes
from .best import Best, key_positions, key_values
from .cofiring import TokenSample
from .contexts import Contexts
from .latent_pass import Tree
from .layout import CONTEXT_SCHEMA, CONTEXTS, LATENTS_PER_GROUP, TOP, fingerprints, list_column
from .sums import LatentSums


def latent_columns(
    sae: SAEModel,
    model: nn.Module,
    sums: LatentSums,
    contexts: Contexts,
    cofiring: TokenSample,
    sizes: IndexSizes,
    tree: Tree | None,
) -> tuple[dict[str, Any], str | None]:
    """Return the columns of `latents.parquet`, and why there are no logit effects (`None` where there are)."""
    firings, tokens = sums.firings(), int(sums.tokens)
    alive = firings.cpu().numpy() > 0
    largest = key_values(contexts.top.keys.amax(1).clamp(min=0))
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
        **_cofiring(cofiring, sizes.cofiring),
        **_neighbours(sae, sizes.neighbours),
        **_relations(tree, len(alive)),
    }
    logits, why = _logits(sae, model, sizes.tokens_of_vocabulary)
    return columns | logits, why


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
    """Return each latent's parent and its children in ascending order."""
    if tree is None:
        parents, scores = np.full(num_latents, -1), np.zeros(num_latents, np.float32)
    else:
        parents, scores = (part.cpu().numpy() for part in tree.parents())
    order = np.argsort(parents, kind="stable")
    order = order[parents[order] >= 0]
    sizes = np.bincount(parents[order], minlength=num_latents)
    offsets = pa.array(np.concatenate([[0], sizes.cumsum()]), pa.int32())
    return {
        "parent": parents.astype(np.int32),
        "parent_score": np.where(parents >= 0, scores, 0).astype(np.float32),
        "children": pa.ListArray.from_arrays(offsets, pa.array(order, pa.int32())),
    }


def context_tables(contexts: Contexts, context_length: int, quantiles: int, each: int) -> Iterator[pa.Table]:
    """Yield the rows of `contexts.parquet`, one table for each row group."""
    top, sample = contexts.top.in_order(), contexts.sample.in_order()
    number = _quantile_numbers(sample, quantiles, each)
    for start in range(0, len(top.keys), LATENTS_PER_GROUP[CONTEXTS]):
        stop = start + LATENTS_PER_GROUP[CONTEXTS]
        kinds = torch.where(top.keys[start:stop] >= 0, 0, -1)
        parts = [
            _rows(top, start, kinds, context_length),
            _rows(sample, start, number[start:stop] + (number[start:stop] >= 0), context_length),
        ]
        latents, kind, order = (np.concatenate(part) for part in zip(*(part[0] for part in parts), strict=True))
        table = pa.concat_tables([part[1] for part in parts])
        names = np.array([TOP, *(str(n) for n in range(quantiles))], dtype=object)
        table = table.append_column("latent", pa.array(latents, pa.int32()))
        table = table.append_column("kind", pa.array(names[kind], pa.string()))
        yield table.select(CONTEXT_SCHEMA.names).take(np.lexsort((order, kind, latents))).cast(CONTEXT_SCHEMA)


def _quantile_numbers(sample: Best, quantiles: int, each: int) -> Tensor:
    """Return the quantile of each sampled context, `(F, R)`; -1 for those that are not kept.

    The sample of a latent is sorted by activation and cut into parts of equal size. Of each part the first few in
    the order of the random keys are kept.
    """
    there = sample.keys >= 0
    peak = sample.payload["peak"].long()
    values = sample.payload["activations"].gather(2, peak).squeeze(2).masked_fill(~there, torch.inf)
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
