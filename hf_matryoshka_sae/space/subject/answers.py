"""What is known of the latents of an open SAE, in plain values."""

from typing import Any

from ...features import Context, Feature
from ...features.patterns.vocabulary import vocabulary_of
from ...features.telling import verdict
from .families import family_of
from .opened import Opened


_EXAMPLES = 3
"""Contexts of each band of activation."""

SORTS = {"energy": "mean_square", "frequency": "frequency", "largest activation": "max", "number": "latent"}


def feature_of(opened: Opened, latent: int) -> dict[str, Any]:
    """A latent's page in plain values.

    Raises:
        `ValueError`: if there is no index or no such latent.
    """
    index = opened.require_index()
    feature: Feature = index.feature(latent)
    texts = vocabulary_of(opened.tokenizer).texts

    def words(pairs: list[tuple[int, float]]) -> list[list[Any]]:
        return [[texts[token], value] for token, value in pairs]

    def named(pairs: list[tuple[int, float]]) -> list[list[Any]]:
        return [[other, value, opened.labels[other]] for other, value in pairs]

    def shown(context: Context) -> dict[str, Any]:
        return {
            "tokens": [texts[token] for token in context.token_ids],
            "activations": context.activations.tolist(),
            "peak": int(context.peak),
            "value": float(context.value),
        }

    bands = zip(feature.bands, feature.band_contexts, strict=False)
    return {
        "latent": latent,
        "latent_id": feature.latent_id,
        "label": opened.labels[latent],
        "count": feature.count,
        "frequency": feature.frequency,
        "energy": feature.mean_square,
        "max": feature.max,
        "first_position_share": feature.first_position_share,
        "quantiles": {str(share): value for share, value in feature.quantiles.items()},
        "histogram": {"edges": feature.histogram[0].tolist(), "counts": feature.histogram[1].tolist()},
        "promoted": words(feature.promoted),
        "suppressed": words(feature.suppressed),
        "neighbours": named(feature.neighbours),
        "cofiring": named(feature.cofiring),
        "parent": None if feature.parent is None else named([(feature.parent, feature.parent_score or 0.0)])[0],
        "children": named([(child, float(opened.tree().score[child])) for child in feature.children]),
        "family": family_of(opened, latent),
        "widths": [width for width in opened.sae.prefix_widths if width > latent],
        "places": opened.places(latent),
        "contexts": [shown(context) for context in feature.top_contexts],
        "bands": [
            {**vars(band), "contexts": [shown(one) for one in contexts[:_EXAMPLES]]} for band, contexts in bands
        ],
        "own_tokens": [texts[token] for token in feature.own_tokens],
        "verdict": verdict(feature, feature.spell),
        "candidates": named(feature.candidates),
        "quantile_contexts": [[shown(one) for one in contexts] for contexts in feature.quantile_contexts.values()],
    }


def list_latents(
    opened: Opened, sort: str, descending: bool, contains: str, start: int, count: int
) -> list[dict[str, Any]]:
    """Rows of the table of latents.

    Raises:
        `ValueError`: for an order there is not, or without an index.
    """
    if sort not in SORTS:
        raise ValueError(f"Latents can be sorted by {', '.join(SORTS)}; got '{sort}'.")
    if start < 0 or not 1 <= count <= 1000:
        raise ValueError(f"Expected `start` of at least 0 and a `count` from 1 to 1000, got {start} and {count}.")
    columns = opened.columns()
    order = columns[SORTS[sort]].argsort(kind="stable")
    order = order[::-1] if descending else order
    if contains.strip():
        wanted = set(opened.labels.search(contains.strip()))
        order = [latent for latent in order.tolist() if latent in wanted]
    widths = opened.sae.prefix_widths
    return [
        {
            "latent": int(latent),
            "label": opened.labels[int(latent)],
            "frequency": float(columns["frequency"][latent]),
            "energy": float(columns["mean_square"][latent]),
            "max": float(columns["max"][latent]),
            "smallest_width": next(width for width in widths if width > latent),
        }
        for latent in list(order)[start : start + count]
    ]
