"""Figures by where text is from: thresholds that give an L0 on one kind of text give another on the next."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from ..activations import DatasetConfig, heldout_batches
from ..activations.text.documents import missing_column, open_dataset, render
from ..common.report import Column, Report
from ..models import SAEModel
from .data import HeldOut
from .fidelity import evaluate_fidelity
from .subjects import Dictionary


logger = logging.getLogger(__name__)

_MOST_SOURCES = 12
_MOST_ROWS = 200_000  # documents that are looked at
_CHARACTERS = 8  # at least as many for each token that is wanted

_COLUMNS = (
    Column("l0", "L0", "latents that fire per token.", ".2f"),
    Column("off", "off target", "L0 over what was asked for, less 1.", "+.1%"),
    Column("fvu", "FVU", "squared error over the variance about the source's mean.", better="lower"),
    Column("tokens", "tokens", "held-out tokens of the source.", ",.0f"),
)


def texts_by_source(dataset: DatasetConfig, characters: int) -> dict[str, list[str]]:
    """Return the first texts of each source of a data set, by its name: those of the most common 12 sources.

    Args:
        dataset ([`DatasetConfig`]): With a `source_column`.
        characters (`int`): Texts of a source are taken until they have as many.

    Raises:
        `ValueError`: if the data set cannot be read or has no such column.
    """
    texts: dict[str, list[str]] = {}
    size: dict[str, int] = {}
    for row in islice(open_dataset(dataset), _MOST_ROWS):
        if dataset.source_column not in row or dataset.column not in row:
            wanted = dataset.source_column if dataset.source_column not in row else dataset.column
            raise missing_column(str(wanted), list(row))
        source = str(row[dataset.source_column])
        if size.get(source, 0) < characters and (text := render(row[dataset.column], dataset.column, None)).strip():
            texts.setdefault(source, []).append(text)
            size[source] = size.get(source, 0) + len(text)
    kept = sorted(texts, key=lambda source: -size[source])[:_MOST_SOURCES]
    if len(kept) < len(texts):
        logger.warning("%d sources have figures, %d with less text are left out.", len(kept), len(texts) - len(kept))
    return {source: texts[source] for source in sorted(kept)}


def heldout_by_source(
    data: HeldOut,
    dataset: DatasetConfig,
    context_length: int = 128,
    tokens: int = 10_000,
    lm_batch_size: int = 32,
    **options: Any,
) -> dict[str, HeldOut]:
    """Return held-out tokens of each source of a data set, read by the language model of `data`.

    Args:
        data ([`HeldOut`]): Language model, tokenizer and hookpoint.
        dataset ([`DatasetConfig`]): With a `source_column`.
        context_length (`int`, *optional*, defaults to 128): Tokens in a window.
        tokens (`int`, *optional*, defaults to 10,000): Tokens of each source; fewer where it has less text, and a
            source that does not fill a window is left out.
        lm_batch_size (`int`, *optional*, defaults to 32): Windows in a batch.
        options: `pack` and `exclude`, as in [`heldout_batches`].

    Raises:
        `ValueError`: if the data set cannot be read or has no such column.
    """
    parts = {}
    for source, texts in texts_by_source(dataset, _CHARACTERS * tokens).items():
        try:
            batches = heldout_batches(texts, data.tokenizer, context_length, tokens, lm_batch_size, **options)
        except ValueError:
            logger.warning("The source '%s' does not fill a window of %d tokens.", source, context_length)
            continue
        parts[source] = replace(data, batches=batches)
    return parts


def figures_by_source(
    saes: Mapping[str, SAEModel], sources: Mapping[str, HeldOut], targets: Mapping[str, float | None] | None = None
) -> list[dict[str, Any]]:
    """Return FVU and L0 of whole SAEs on each source: a row each.

    All processes call this together where there are several.

    Args:
        saes (`Mapping[str, SAEModel]`): By name, for raw hidden states.
        sources (`Mapping[str, HeldOut]`): By name, as [`heldout_by_source`] gives them.
        targets (`Mapping[str, float]`, *optional*): L0 that was asked for; by default an SAE's own `k`, if it has one.

    Returns:
        `list[dict]`: `subject`, `width`, `source`, `tokens`, `l0`, `off` (L0 over its target, less 1) and `fvu`.
    """
    rows = []
    wanted = {name: (targets or {}).get(name, getattr(sae.config, "k", None)) for name, sae in saes.items()}
    for source, data in sources.items():
        subjects = {name: Dictionary(sae, [sae.config.num_latents]) for name, sae in saes.items()}
        result = evaluate_fidelity(data, subjects, language_model=False, similarity_tokens=0, show=False)
        for name, (row,) in result["subjects"].items():
            target = wanted[name]
            figures = {"width": row["width"], "tokens": result["tokens"], "l0": row["l0"], "fvu": row["fvu"]}
            off = row["l0"] / target - 1 if target else None
            rows.append({"subject": name, "source": source, **figures, "off": off})
    return rows


def sources_report(rows: Sequence[dict[str, Any]]) -> Report:
    """Return the [`Report`] of [`figures_by_source`]."""
    ordered = sorted(rows, key=lambda row: row["subject"])
    records = [row | {"subject": f"{row['subject']}: {row['source']}"} for row in ordered]
    return Report("sources", "By source of text", records, _COLUMNS, {}, ["l0"])


def off_target(rows: Sequence[dict[str, Any]], tolerance: float = 0.1) -> list[str]:
    """Return a sentence for each SAE whose L0 is further than `tolerance` from its target on some source."""
    far: dict[str, list[str]] = {}
    for row in rows:
        if row["off"] is not None and abs(row["off"]) > tolerance:
            far.setdefault(row["subject"], []).append(f"{row['source']} {row['l0']:.1f} ({row['off']:+.0%})")
    return [
        f"{name}: its thresholds give another L0 than asked for on some text: {', '.join(parts)}. One threshold holds "
        "on the mix it was solved on; for such text alone solve it again (`progressive.calibrate_thresholds`)."
        for name, parts in far.items()
    ]
