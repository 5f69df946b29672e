"""Scores of latents by how often they fire, and of SAEs at the same frequencies.

A score of an explanation depends on how often a latent fires: what is rare is easier to say in a few patterns, and
what fires often has a larger F1 by chance. A prefix of a Matryoshka SAE is full of frequent latents, so that SAEs
compared width by width are compared by frequency as well. Here latents are sorted into bins of half a decade of
frequency; SAEs are compared at a width by the mean over bins that each of them has latents in, every bin with the
same weight for all: the mean of the SAEs' shares of latents in it (direct standardisation).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...common.intervals import middle_95, resampled_means
from ...common.report import Column, text_table


BINS_A_DECADE = 2
LEAST_FOR_INTERVAL = 8
"""No interval is drawn over fewer latents."""

_LEAST_IN_BIN = 4


def bin_of(frequency: np.ndarray) -> np.ndarray:
    """Return the half decade of each frequency: 0 for 10^-.5 and above, then -1, -2 and so on downwards."""
    return np.minimum(0, np.floor(np.log10(np.maximum(frequency, 1e-12)) * BINS_A_DECADE).astype(int) + 1)


def bin_name(number: int) -> str:
    """Return the ends of a bin as text."""
    low, high = (10 ** ((number + end) / BINS_A_DECADE) for end in (-1, 0))
    return f"{low:.1g} to {high:.1g}"


def by_frequency(
    latents: Mapping[str, Sequence[Any]], names: Sequence[str], resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Return the mean scores of the latents of each subject in each bin of frequency.

    Args:
        latents (`Mapping[str, Sequence]`): Latents with `frequency` and each score, by subject.
        names (`Sequence[str]`): The scores.
        resamples (`int`, *optional*, defaults to 1000): Of the intervals: 95%, bootstrap over latents.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.

    Returns:
        `list[dict]`: `subject`, `bin`, `frequency` (the bin's ends as text), `latents`, each score and its
        `<score>_interval`, `None` over fewer than eight latents.
    """
    generator, rows = np.random.default_rng(seed), []
    for subject, own in latents.items():
        bins = bin_of(np.array([one.frequency for one in own]))
        table = _table(own, names)
        for number in sorted(set(bins.tolist()), reverse=True):
            part = table[bins == number]
            row = {"subject": subject, "bin": int(number), "frequency": bin_name(number), "latents": len(part)}
            intervals = middle_95(resampled_means(part, resamples, generator))
            for name, mean, interval in zip(names, part.mean(0).tolist(), intervals, strict=True):
                row |= {name: mean, f"{name}_interval": interval if len(part) >= LEAST_FOR_INTERVAL else None}
            rows.append(row)
    return rows


def matched(
    latents: Mapping[str, Sequence[Any]],
    names: Sequence[str],
    widths: Sequence[int],
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the scores of SAEs at each width as if their latents fired equally often.

    Args:
        latents (`Mapping[str, Sequence]`): Of each SAE the latents that were drawn, with `latent` (their place),
            `frequency`, `weight` (how many latents of the SAE each stands for) and the scores.
        names (`Sequence[str]`): The scores.
        widths (`Sequence[int]`): Widths at which to compare.
        resamples (`int`, *optional*, defaults to 1000): Of the intervals: 95%, bootstrap over latents within bins.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.

    Returns:
        `list[dict]`: For each width and SAE `subject`, `width`, `latents` (compared), `covered` (share of the SAE's
        latents in bins that all SAEs have), the scores and their intervals. No row where no bin is shared.
    """
    generator, rows = np.random.default_rng(seed), []
    for width in widths:
        binned = {name: _in_bins([one for one in of_sae if one.latent < width]) for name, of_sae in latents.items()}
        enough = [{n for n, part in bins.items() if len(part) >= _LEAST_IN_BIN} for bins in binned.values()]
        shared = sorted(set.intersection(*enough)) if enough else []
        if not shared:
            continue
        shares = {name: _shares(bins) for name, bins in binned.items()}
        weights = np.array([np.mean([of_sae[number] for of_sae in shares.values()]) for number in shared])
        weights /= weights.sum()
        for name, bins in binned.items():
            tables = [_table(bins[number], names) for number in shared]
            chances = [_chances(bins[number]) for number in shared]
            means = np.array([chance @ table for chance, table in zip(chances, tables, strict=True)])
            samples = np.array(
                [
                    table[generator.choice(len(table), (resamples, len(table)), p=chance)].mean(1)
                    for chance, table in zip(chances, tables, strict=True)
                ]
            )
            count = sum(map(len, tables))
            row = {"subject": name, "width": width, "latents": count}
            row["covered"] = float(sum(shares[name][number] for number in shared))
            intervals = middle_95(np.tensordot(weights, samples, 1))
            for key, value, interval in zip(names, (weights @ means).tolist(), intervals, strict=True):
                row |= {key: value, f"{key}_interval": interval if count >= LEAST_FOR_INTERVAL else None}
            rows.append(row)
    return rows


def _table(latents: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    return np.array([[getattr(one, name) for name in names] for one in latents]).reshape(-1, len(names))


def _in_bins(latents: Sequence[Any]) -> dict[int, list[Any]]:
    bins: dict[int, list[Any]] = {}
    for one, number in zip(latents, bin_of(np.array([one.frequency for one in latents])).tolist(), strict=True):
        bins.setdefault(number, []).append(one)
    return bins


def _chances(latents: Sequence[Any]) -> np.ndarray:
    weights = np.array([one.weight for one in latents], dtype=float)
    return weights / weights.sum()


def _shares(bins: Mapping[int, Sequence[Any]]) -> dict[int, float]:
    sums = {number: sum(one.weight for one in part) for number, part in bins.items()}
    return {number: each / sum(sums.values()) for number, each in sums.items()}


def frequency_text(rows: Sequence[dict[str, Any]], columns: Sequence[Column], names: Sequence[str]) -> str:
    """Return what [`by_frequency`] found as a table in plain text."""
    return _text("By frequency:", rows, columns, names, ("frequency", "fires on"))


def matched_text(rows: Sequence[dict[str, Any]], columns: Sequence[Column], names: Sequence[str]) -> str:
    """Return what [`matched`] found as a table in plain text."""
    lines = [{**row, "covered": f"{row['covered']:.0%}"} for row in rows]
    title = "At equal frequency (every bin that all SAEs have latents in weighs the same for each):"
    return _text(title, lines, columns, names, ("width", "width"), ("covered", "of its latents"))


def _text(
    title: str,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[Column],
    names: Sequence[str],
    *keys: tuple[str, str],
) -> str:
    chosen = [column for name in names for column in columns if column.name == name]
    titles = ["", *(title for _, title in keys), "latents"]
    cells = [[row["subject"], *(str(row[key]) for key, _ in keys), str(row["latents"])] for row in rows]
    for column in chosen:
        titles += [column.title, "95%"]
        cells = [[*line, column.cell(row), column.bounds_cell(row)] for line, row in zip(cells, rows, strict=True)]
    return "\n".join([title, *text_table(titles, cells)])
