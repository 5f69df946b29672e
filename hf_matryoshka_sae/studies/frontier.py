"""SAEs of any family on one frontier of sparsity and error, compared at equal L0; and what two of them have in common.

Families differ in L0 even where the same was asked for, and FVU falls with L0, so FVUs side by side say little. Here
each SAE is read at several L0: of each token's latents those with the smallest contribution a_i ||d_i|| are dropped,
by one threshold over all tokens, so that an SAE has one curve from its own L0 downwards. At equal L0 means at the
smallest L0 that any of the SAEs has of its own. A curve says what an SAE's own latents are worth, not what its recipe
would give if it were trained for that L0.

Shapes: N tokens, D `d_in`, F latents, L values of L0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.report import Column, Report
from ..evaluation.baselines import random_dictionary
from ..evaluation.data import HeldOut
from ..evaluation.reconstruction import ReconstructionSums
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs, row_norms
from .drawn_latents import kind_of
from .weights.matching import decoder_matching, matched_cosine


SHARES = (1.0, 0.85, 0.7, 0.5, 0.35, 0.2)
"""Shares of an SAE's own L0 at which it is read."""

COLUMNS = (
    Column("l0", "L0", "latents that are left on a token.", ".2f"),
    Column("fvu", "FVU", "of the reconstruction from them.", better="lower", limits=(0, 1.2)),
    Column("fvu_equal", "FVU at equal L0", "the same, between two points of the curve.", better="lower"),
    Column("own_l0", "own L0", "latents that fire where none is dropped.", ".2f", table="value"),
)


@torch.no_grad()
def sparsity_frontier(
    data: HeldOut,
    saes: Mapping[str, SAEModel],
    l0: float | None = None,
    shares: Sequence[float] = SHARES,
    baselines: bool = True,
    seed: int = 0,
) -> Report:
    """Measure error against sparsity of SAEs of any families, and compare them at equal L0.

    Args:
        data ([`HeldOut`]): Held-out tokens; every process reads all of them.
        saes (`Mapping[str, SAEModel]`): SAEs of one hookpoint by name, in `eval` mode.
        l0 (`float`, *optional*): L0 at which to compare; by default the smallest of the SAEs' own.
        shares (`Sequence[float]`, *optional*): Shares of an SAE's own L0 at which it is read.
        baselines (`bool`, *optional*, defaults to `True`): Also read a random dictionary for each SAE.
        seed (`int`, *optional*, defaults to 0): Seed of the random directions.

    Returns:
        [`Report`]: a row for each SAE and share, in the order of L0; `fvu_equal` is in the row of an SAE's own L0, and
        `None` where its curve does not reach there.

    Raises:
        `ValueError`: if there is no SAE, or one fires nowhere.
    """
    if not saes:
        raise ValueError("Name at least one SAE.")
    states = [data.states(batch.to(data.device)) for batch in data.batches]
    subjects = dict(saes)
    if baselines:
        subjects |= {f"random ({name})": random_dictionary(sae, states, seed=seed) for name, sae in saes.items()}
    curves = {name: _curve(sae.to(data.device), states, sorted(shares)) for name, sae in subjects.items()}
    equal = min(curves[name][-1]["l0"] for name in saes) if l0 is None else l0
    records = []
    for name, curve in curves.items():
        own = curve[-1]["l0"]
        for row in curve:
            record = {"subject": name, "kind": kind_of(name), "width": subjects[name].config.num_latents, **row}
            record |= {"own_l0": own, "fvu_equal": _at(curve, equal) if row is curve[-1] else None}
            records.append(record)
    about = {"hookpoint": data.hookpoint, "tokens": data.tokens, "equal_l0": equal}
    title = f"{data.hookpoint}: error against sparsity, compared at L0 {equal:.2f}"
    return Frontier("frontier", title, records, COLUMNS, about)


def _curve(sae: SAEModel, states: Sequence[Tensor], shares: Sequence[float]) -> list[dict[str, float]]:
    norms = row_norms(sae.W_dec.float())
    fired = [sae.encode_pairs(x.to(sae.W_enc)) for x in states]
    fired = [pairs.keep(pairs.values > 0) for pairs in fired]
    # With `scale_by_decoder_norm` values are contributions already.
    lengths = norms.new_ones(len(norms)) if sae.config.scale_by_decoder_norm else norms
    sizes = [pairs.values.float() * lengths[pairs.cols] for pairs in fired]
    everything, tokens = torch.cat(sizes).cpu().numpy(), sum(map(len, states))
    if not len(everything):
        raise ValueError("An SAE fires on none of these tokens; there is nothing to compare.")
    cuts = np.quantile(everything, [1 - share for share in shares])
    sums = [ReconstructionSums.zeros(1, states[0].shape[1]) for _ in shares]
    counts = np.zeros(len(shares))
    for x, pairs, size in zip(states, fired, sizes, strict=True):
        for number, (cut, share) in enumerate(zip(cuts, shares, strict=True)):
            left: LatentPairs = pairs if share == 1 else pairs.keep(size >= float(cut))
            counts[number] += len(left.values)
            sums[number].add(x, sae.decode_pairs(left, [sae.config.num_latents]).float())
    return [
        {"l0": count / tokens, "fvu": one.rows()[0]["fvu"]} for count, one in zip(counts.tolist(), sums, strict=True)
    ]


def _at(curve: Sequence[dict[str, float]], l0: float) -> float | None:
    """Return FVU at an L0, linear between the points of a curve; `None` outside it."""
    places, values = ([row[key] for row in curve] for key in ("l0", "fvu"))
    inside = places[0] - 1e-9 <= l0 <= places[-1] + 1e-9
    return float(np.interp(l0, places, values)) if inside else None


def agreement(saes: Mapping[str, SAEModel]) -> list[dict[str, Any]]:
    """Return how alike the latents of each two SAEs are, such as two seeds of a recipe.

    Args:
        saes (`Mapping[str, SAEModel]`): SAEs of one `d_in`, by name.

    Returns:
        `list[dict]`: For each pair and common prefix width `first`, `second`, `width` and the entries of
        [`matched_cosine`]; beside it `random`, the same of random rows of that shape.
    """
    rows, names = [], list(saes)
    generator = torch.Generator().manual_seed(0)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            one, two = saes[first], saes[second]
            widths = sorted(set(one.prefix_widths) & set(two.prefix_widths)) or [
                min(one.config.num_latents, two.config.num_latents)
            ]
            for row in decoder_matching(one, two, widths):
                draws = (torch.randn(row["width"], one.config.d_in, generator=generator) for _ in range(2))
                chance = matched_cosine(*draws)["matched_cosine"]
                rows.append({"first": first, "second": second, **row, "random": chance})
    return rows


class Frontier(Report):
    """A [`Report`] whose plot has FVU against L0."""

    def figure(self) -> Any:
        """Draw every SAE's curve, its own L0 as a dot, and the L0 at which they are compared."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 4.4), layout="constrained")
        axis = figure.subplots()
        for number, (name, rows) in enumerate(self.subjects().items()):
            dashed = "--" if rows[0]["kind"] == "random" else "-"
            points = [(row["l0"], row["fvu"]) for row in rows]
            axis.plot(*zip(*points, strict=True), dashed, color=f"C{number}", label=name)
            axis.plot(*points[-1], "o", color=f"C{number}")
        axis.axvline(self.about["equal_l0"], color="black", linewidth=0.8, linestyle=":", label="equal L0")
        axis.set(xlabel="L0 (latents on a token)", ylabel="FVU (lower is better)", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
        return figure
