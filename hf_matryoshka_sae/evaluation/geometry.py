"""The geometry of a dictionary's rows, and how often its latents fire, for every prefix.

Names of metrics follow SAEBench (Karvonen et al. 2025, arXiv 2503.09532). All widths are read off one pass: a
similarity of latents i and j counts for every prefix that holds both, so maxima are taken per group of columns and
then run over the groups.

Shapes: F latents, D `d_in`, P prefixes, B latents in a block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import SAEModel
from ..models.sparse_ops import row_norms
from .firing import FiringSums


_BLOCK_ENTRIES = 2**24
_NEAR = 0.9
_LOWEST_DECADE, _BINS_PER_DECADE = -8, 4


def groups(widths: Sequence[int]) -> list[slice]:
    """Return the latents that each width adds to the one before."""
    return [slice(start, stop) for start, stop in zip([0, *widths], widths, strict=False)]


def checked_widths(widths: Sequence[int] | None, sae: SAEModel) -> list[int]:
    """Return the widths, by default the prefixes of `sae`.

    Raises:
        `ValueError`: if they do not strictly increase between 1 and the size of `sae`.
    """
    widths = list(sae.prefix_widths if widths is None else widths)
    latents = sae.config.num_latents
    if not widths or widths[-1] > latents or any(a >= b for a, b in zip([0, *widths], widths, strict=False)):
        raise ValueError(f"`widths` must strictly increase from 1 or more to at most {latents}, got {widths}.")
    return widths


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows at length 1, and which of them have a direction: a row of zeros stays one."""
    return rows / row_norms(rows)[:, None], rows.norm(dim=1) > 0


def prefix_maxima(similarities: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the maximum `(B, P)` of each row of `(B, F)` over the first `width` columns, for each width."""
    return torch.stack([similarities[:, group].amax(1) for group in groups(widths)], 1).cummax(1).values


def max_cosines(rows: Tensor, widths: Sequence[int], block_rows: int | None = None) -> Tensor:
    """Return the largest cosine similarity of each row with any other row of each prefix.

    Args:
        rows (`Tensor` of shape `(F, D)`): Rows of a matrix, such as a decoder.
        widths (`Sequence[int]`): P strictly increasing widths that end at F.
        block_rows (`int`, *optional*): Rows compared with all others at a time; by default as many as fit 64 MB.

    Returns:
        `Tensor` of shape `(F, P)`: NaN for a row of zeros and where a prefix holds no other row that is not zero.
    """
    unit, directed = unit_rows(rows)
    size = block_rows or max(1, _BLOCK_ENTRIES // len(unit))
    maxima = []
    for start in range(0, len(unit), size):
        similarities = (unit[start : start + size] @ unit.T).masked_fill_(~directed, -torch.inf)
        similarities.diagonal(start).fill_(-torch.inf)
        maxima.append(prefix_maxima(similarities, widths))
    cosines = torch.cat(maxima).clamp_(max=1)
    cosines[~directed] = torch.nan
    return cosines.masked_fill_(cosines == -torch.inf, torch.nan)


@torch.no_grad()
def weight_geometry(sae: SAEModel, widths: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Return the geometry of every prefix: how many of its latents repeat each other.

    There are three measures of the decoder's redundancy. With unit rows u_i and the eigenvalues l of their covariance
    1/n sum (u_i - mean)(u_i - mean)^T, the `participation_ratio` is (sum l)^2 / sum l^2 and the `effective_rank` is
    exp(-sum p log p), p = l / sum l (Roy & Vetterli 2007): both are D for rows spread evenly over all directions and 1
    for rows on a line. `share_near_duplicates` is the share of rows whose largest cosine with another is above 0.9.
    Lengths are left out because an SAE may move them between its encoder and its decoder.

    Args:
        sae ([`SAEModel`]): An SAE; nothing is read but its weights, in F^2 D operations.
        widths (`Sequence[int]`, *optional*): Strictly increasing widths; by default the prefixes of `sae`.

    Returns:
        `list[dict]`: a row per width. Rows of zeros are left out of means and counted; a mean over nothing is `None`.

    Raises:
        `ValueError`: if the widths do not increase, or weights are not finite.
    """
    widths = checked_widths(widths, sae)
    encoder, decoder = sae.W_enc[: widths[-1]].float(), sae.W_dec[: widths[-1]].float()
    if not (encoder.isfinite().all() and decoder.isfinite().all()):
        raise ValueError("The SAE's weights hold NaN or infinity; its geometry cannot be measured.")
    (encoder_unit, encoder_directed), (decoder_unit, decoder_directed) = unit_rows(encoder), unit_rows(decoder)
    cosine = (encoder_unit * decoder_unit).sum(1).where(encoder_directed & decoder_directed, torch.nan)
    encoder_norm, decoder_norm, encoder_bias = encoder.norm(dim=1), decoder.norm(dim=1), sae.b_enc.float()
    encoder_maxima, decoder_maxima = max_cosines(encoder, widths), max_cosines(decoder, widths)
    rows = []
    for p, (width, covariance) in enumerate(_covariances(sae.W_dec, widths)):
        nearest = decoder_maxima[:width, p]
        rank, ratio = _spread(covariance)
        rows.append(
            {
                "width": width,
                "average_max_encoder_cosine_sim": _mean(encoder_maxima[:width, p]),
                "average_max_decoder_cosine_sim": _mean(nearest),
                "encoder_decoder_cosine_sim": _mean(cosine[:width]),
                "encoder_norm": _mean(encoder_norm[:width]),
                "encoder_bias": _mean(encoder_bias[:width]),
                "decoder_norm": _mean(decoder_norm[:width]),
                "share_near_duplicates": _mean(torch.where(nearest.isnan(), nearest, (nearest > _NEAR).to(nearest))),
                "effective_rank": rank,
                "participation_ratio": ratio,
                "zero_encoder_rows": int((encoder_norm[:width] == 0).sum()),
                "zero_decoder_rows": int((decoder_norm[:width] == 0).sum()),
            }
        )
    return rows


def _mean(values: Tensor) -> float | None:
    values = values[~values.isnan()].double()
    return values.mean().item() if len(values) else None


def _covariances(rows: Tensor, widths: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the covariance `(D, D)` of the unit rows of each prefix, in float64; rows of zeros are left out."""
    count, total, outer = 0, 0.0, 0.0
    for width, group in zip(widths, groups(widths), strict=True):
        unit, directed = unit_rows(rows[group].double())
        part = unit[directed]
        count, total, outer = count + len(part), total + part.sum(0), outer + part.T @ part
        mean = total / max(1, count)
        yield width, outer / max(1, count) - mean.outer(mean)


def _spread(covariance: Tensor) -> tuple[float | None, float | None]:
    """Return effective rank and participation ratio of a covariance of unit rows; `None` where all are equal."""
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    total = eigenvalues.sum()
    if total < 1e-12:  # rounding: unit rows add up to at most 1
        return None, None
    shares = eigenvalues / total
    return torch.special.entr(shares).sum().exp().item(), (1 / shares.square().sum()).item()


# Firing


def density_metrics(firing: FiringSums, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Return how the firing frequencies of every prefix are spread.

    A latent's density is the share of tokens on which it fires. `freq_over_1_percent` is the share of latents above
    that density and `normalized_freq_over_1_percent` the share of all firings that are theirs; the same for 10
    percent. `frac_alive` is the share that fires at all, which grows with the number of tokens: compare it at the same
    `tokens` only. The histogram counts alive latents in quarters of a decade from 1e-8 to 1.

    Args:
        firing ([`FiringSums`]): Firings of the full dictionary over all processes; they are the same in every prefix.
        widths (`Sequence[int]`): Strictly increasing widths, at most F.

    Returns:
        `list[dict]`: a row per width; shares of firings are `None` where nothing fires.

    Raises:
        `ValueError`: if no tokens were counted.
    """
    if not firing.tokens:
        raise ValueError("There are no tokens to take densities over: nothing was counted.")
    density, tokens = firing.frequency.cpu(), int(firing.tokens)
    return [{"width": width, "tokens": tokens, **_densities(density[:width])} for width in widths]


def _densities(density: Tensor) -> dict[str, Any]:
    metrics: dict[str, Any] = {"frac_alive": (density > 0).double().mean().item()}
    total = density.sum().item()
    for percent in (1, 10):
        often = density > percent / 100
        metrics[f"freq_over_{percent}_percent"] = often.double().mean().item()
        metrics[f"normalized_freq_over_{percent}_percent"] = density[often].sum().item() / total if total else None
    edges = torch.linspace(_LOWEST_DECADE, 0, 1 - _LOWEST_DECADE * _BINS_PER_DECADE, dtype=torch.float64)
    logs = density[density > 0].log10().clamp(min=_LOWEST_DECADE)
    metrics["density_log10_edges"] = edges.tolist()
    metrics["density_histogram"] = torch.histogram(logs, edges).hist.long().tolist()
    return metrics
