"""Measure whether two dictionaries hold the same latents.

By activations: the maximum mean correlation (MMC) of Nabeshima (Matryoshka Sparse Autoencoders, 2024) is the mean,
over the latents of reference SAEs, of the largest correlation of activations with any latent of the SAE. By weights:
cosines of matched decoder rows, as for two seeds of one run.

Shapes: N tokens, D `d_in`, F latents of the SAE, R latents of all references, P prefixes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...common.distributed import reduce_sum
from ...evaluation.data import HasActivations
from ...evaluation.firing import add_moments
from ...evaluation.geometry import checked_widths, groups, unit_rows
from ...evaluation.similarity import checked_batches
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs


_BLOCK_ENTRIES = 2**23
_ROUNDING = 1e-12


class CorrelationSums:
    """Sums over tokens, in float64, for Pearson correlations of an SAE's latents with those of reference SAEs.

    Memory is 8 F R bytes for the products, and blocks of 64 MB beside them. All references are seen in one pass, so
    that hidden states are harvested once.

    Args:
        sae ([`SAEModel`]): The SAE, in `eval` mode.
        references (`Sequence[SAEModel]`): Reference SAEs of the same `d_in`, in `eval` mode.
        memory_limit (`int`, *optional*, defaults to 4 GiB): Largest number of bytes for the products.

    Raises:
        `ValueError`: if the references are missing, read other hidden states, or the products do not fit.
    """

    def __init__(self, sae: SAEModel, references: Sequence[SAEModel], memory_limit: int = 2**32) -> None:
        self.sae, self.references = sae, list(references)
        if not self.references:
            raise ValueError("There are no reference SAEs to compare with.")
        for reference in self.references:
            if reference.config.d_in != sae.config.d_in:
                raise ValueError(
                    f"The SAE takes hidden states of width {sae.config.d_in}, a reference of {reference.config.d_in}; "
                    "both must read the same hookpoint."
                )
        latents, others = sae.config.num_latents, sum(reference.config.num_latents for reference in self.references)
        if 8 * latents * others > memory_limit:
            raise ValueError(
                f"Correlations of {latents} latents with {others} of the references take "
                f"{8 * latents * others / 2**30:.1f} GiB, over the limit of {memory_limit / 2**30:.1f} GiB. Pass "
                "fewer references at a time, `truncate` the SAE, or raise `memory_limit`."
            )
        options = {"dtype": torch.float64, "device": sae.W_enc.device}
        self.products = torch.zeros(latents, others, **options)
        self.moments = torch.zeros(2, latents, **options)
        self.other_moments = torch.zeros(2, others, **options)
        self.tokens = torch.zeros((), **options)

    def add(self, x: Tensor) -> None:
        """Add tokens `(n, D)`."""
        x = x.to(self.sae.W_enc)
        for part in x.split(max(1, _BLOCK_ENTRIES // self.products.shape[1])):
            pairs = self.sae.encode_pairs(part)
            others = torch.cat([_dense(reference, part) for reference in self.references], 1)
            self._add_products(pairs, others)
            add_moments(self.moments, pairs.cols, pairs.values)
            self.other_moments += torch.stack([others.sum(0), others.square().sum(0)])
            self.tokens += len(part)

    def _add_products(self, pairs: LatentPairs, others: Tensor) -> None:
        if pairs.index.dense:
            self.products.addmm_(pairs.index.spread(pairs.values.double()).T, others)
            return
        order, offsets = pairs.index.by_latent
        rows, values = pairs.rows[order], pairs.values[order].double()
        bounds = offsets.tolist()
        step = max(1, _BLOCK_ENTRIES // others.shape[1])
        for start in range(0, len(self.products), step):
            stop = min(start + step, len(self.products))
            first, last = bounds[start], bounds[stop]
            if first < last:
                self.products[start:stop] += embedding_bag(
                    rows[first:last],
                    others,
                    offsets[start : stop + 1] - first,
                    mode="sum",
                    per_sample_weights=values[first:last],
                    include_last_offset=True,
                )

    def reduce(self) -> None:
        """Add up the sums of all processes.

        Raises:
            `ValueError`: if no process saw a token.
        """
        reduce_sum(self.products, self.moments, self.other_moments, self.tokens)
        if not self.tokens:
            raise ValueError("There are no tokens to correlate latents on: the activations are empty.")

    def largest(self, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return each reference latent's largest correlation with any of the first `width` latents.

        Args:
            widths (`Sequence[int]`): The P widths.

        Returns:
            `tuple[Tensor, Tensor]`: Correlations `(P, R)`, -inf where no latent of the prefix varies, and a mask
            `(R,)` of the reference latents that vary.
        """
        mean, deviation = _mean_and_deviation(self.moments, self.tokens)
        other_mean, other_deviation = _mean_and_deviation(self.other_moments, self.tokens)
        largest = self.products.new_full((len(widths), len(other_mean)), -torch.inf)
        step = max(1, _BLOCK_ENTRIES // len(other_mean))
        for p, group in enumerate(groups(widths)):
            for start in range(group.start, group.stop, step):
                block = slice(start, min(start + step, group.stop))
                covariance = self.products[block] / self.tokens - mean[block, None] * other_mean
                correlations = covariance / (deviation[block, None] * other_deviation)
                correlations[deviation[block] == 0] = -torch.inf
                largest[p] = torch.maximum(largest[p], correlations.amax(0))
        return largest.cummax(0).values.clamp(max=1), other_deviation > 0


def _dense(sae: SAEModel, x: Tensor) -> Tensor:
    """Return the activations `(n, F)` in float64."""
    pairs = sae.encode_pairs(x.to(sae.W_enc))
    return pairs.index.spread(pairs.values.double())


def _mean_and_deviation(moments: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each latent; the deviation is 0 for dead and constant latents."""
    mean, square = moments / tokens
    variance = square - mean.square()
    return mean, torch.where(variance > _ROUNDING * square, variance, 0).sqrt()


@torch.no_grad()
def maximum_mean_correlation(
    sae: SAEModel,
    references: SAEModel | Sequence[SAEModel],
    activations: HasActivations | Iterable[Tensor],
    widths: Sequence[int] | None = None,
    memory_limit: int = 2**32,
) -> list[dict[str, Any]]:
    """Compute the MMC of every prefix of an SAE to one or several reference SAEs.

    Pearson correlations of activations over tokens, zeros included, come from sums in float64 over all processes. Each
    reference latent that varies counts once, whichever reference it is from; dead latents of either side have no
    correlation and are left out. All latents of the SAE compete for places (selection `"mask"`).

    Args:
        sae ([`SAEModel`]): The SAE, in `eval` mode.
        references ([`SAEModel`] or `Sequence[SAEModel]`): Reference SAEs, for example of several widths.
        activations ([`HasActivations`] or iterable of `Tensor`): Hidden states in batches `(n, D)`; read once.
        widths (`Sequence[int]`, *optional*): Widths to measure, strictly increasing; by default the prefixes of `sae`.
        memory_limit (`int`, *optional*, defaults to 4 GiB): Largest number of bytes for the products, 8 F R.

    Returns:
        `list[dict]`: For each width `mmc`, `mmc_per_reference` (each `None` where nothing varies),
        `reference_latents` (number of those that vary) and `tokens`.

    Raises:
        `ValueError`: for SAEs of different `d_in`, too many latents for the limit, or empty or bad activations.
    """
    widths = checked_widths(widths, sae)
    references = [references] if isinstance(references, SAEModel) else list(references)
    sums = CorrelationSums(sae, references, memory_limit)
    for x in checked_batches(activations, sae.config.d_in, "correlating latents"):
        sums.add(x)
    sums.reduce()
    largest, varies = sums.largest(widths)
    sizes = [reference.config.num_latents for reference in references]
    return [
        {
            "width": width,
            "mmc": _mean(row, varies),
            "mmc_per_reference": [_mean(*parts) for parts in zip(row.split(sizes), varies.split(sizes), strict=True)],
            "reference_latents": int(varies.sum()),
            "tokens": int(sums.tokens),
        }
        for width, row in zip(widths, largest, strict=True)
    ]


def _mean(largest: Tensor, varies: Tensor) -> float | None:
    largest = largest[varies]
    return largest.mean().item() if len(largest) and largest.isfinite().all() else None


@torch.no_grad()
def decoder_matching(
    sae: SAEModel, other: SAEModel, widths: Sequence[int] | None = None, hungarian_limit: int = 4096
) -> list[dict[str, Any]]:
    """Compute matched cosines between the decoders of two SAEs, such as two seeds of a run, prefix by prefix.

    Args:
        sae ([`SAEModel`]): The first SAE.
        other ([`SAEModel`]): The second SAE, of the same `d_in`; the first `width` latents of each are compared.
        widths (`Sequence[int]`, *optional*): Widths to compare, strictly increasing; by default the prefixes of `sae`.
        hungarian_limit (`int`, *optional*, defaults to 4096): Largest number of rows that are matched one to one; see
            [`matched_cosine`].

    Returns:
        `list[dict]`: For each width `width` and the entries of [`matched_cosine`].
    """
    rows, others = sae.W_dec.float(), other.W_dec.float()
    return [
        {"width": width, **matched_cosine(rows[:width], others[:width], hungarian_limit)}
        for width in checked_widths(widths, sae)
    ]


@torch.no_grad()
def matched_cosine(rows: Tensor, others: Tensor, hungarian_limit: int = 4096) -> dict[str, Any]:
    """Return the mean cosine of matched rows of two decoders.

    Args:
        rows (`Tensor` of shape `(A, D)`): Rows of the first decoder; zero rows are left out.
        others (`Tensor` of shape `(B, D)`): Rows of the second decoder; zero rows are left out.
        hungarian_limit (`int`, *optional*, defaults to 4096):
            Largest number of rows on either side that are matched one to one so that the sum of cosines is largest
            (the Hungarian method, whose time grows with the cube). With more, each of `others` is matched with its
            nearest of `rows`, which several may share: an upper bound where there are at least as many `others`.

    Returns:
        `dict`: `matched_cosine` (`None` where no rows are left), `method` (`"hungarian"` or `"max"`) and `pairs`.

    Raises:
        `ValueError`: for rows of different widths, or numbers that are not finite.
    """
    if rows.dim() != 2 or others.dim() != 2 or rows.shape[1] != others.shape[1]:
        raise ValueError(f"Expected rows (A, D) and (B, D), got {tuple(rows.shape)} and {tuple(others.shape)}.")
    if not (rows.isfinite().all() and others.isfinite().all()):
        raise ValueError("Rows to match must be finite; they hold NaN or infinity.")
    rows, others = (unit[directed] for unit, directed in (unit_rows(rows), unit_rows(others)))
    method = "hungarian" if max(len(rows), len(others)) <= hungarian_limit else "max"
    if not len(rows) or not len(others):
        return {"matched_cosine": None, "method": method, "pairs": 0}
    if method == "hungarian":
        cosines = (rows @ others.T).double().cpu().numpy()
        best = torch.from_numpy(cosines[linear_sum_assignment(cosines, maximize=True)])
    else:
        blocks = others.split(max(1, _BLOCK_ENTRIES // len(rows)))
        best = torch.cat([(block @ rows.T).amax(1) for block in blocks]).double()
    return {"matched_cosine": best.mean().item(), "method": method, "pairs": len(best)}
