"""Measure how many of the known features a dictionary recovers, at each width.

Latents are matched with features one to one, so that the sum of the absolute correlations of their activations is
largest (Hungarian method), at each width among its own latents: where there are fewer latents than features, some
features have no latent. Latents are matched on some samples and measured on others.

Shapes: N samples, F features, L latents, P widths, M matched pairs, which are min(F, width).
"""

from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from ...common.seeds import derived_seed
from ...evaluation.geometry import checked_widths
from ...models import JumpReLUSAE, JumpReLUSAEConfig, SAEModel
from .settings import SAMPLES
from .synthetic import SyntheticModel


_BLOCK_ENTRIES = 2**23
_DECILES = 10


class _Sums:
    """Moments of features and latents over samples, and how often they are on together."""

    def __init__(
        self, model: SyntheticModel, sae: SAEModel, samples: int, seed: int, parents: Sequence[int] = ()
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        below = torch.zeros(model.num_features, len(parents))
        for place, parent in enumerate(parents):
            below[model.children(parent), place] = 1
        size = max(1, _BLOCK_ENTRIES // max(model.num_features, sae.config.num_latents))
        totals: list[Tensor] | None = None
        for start in range(0, samples, size):
            features, x = model.sample(min(size, samples - start), generator)
            activations = encode(sae, x)
            on, fires = (features > 0).float(), (activations > 0).float()
            child = ((on @ below) > 0).float()
            parts = [
                features.sum(0),
                features.square().sum(0),
                activations.sum(0),
                activations.square().sum(0),
                features.T @ activations,
                on.sum(0),
                fires.sum(0),
                on.T @ fires,
                child.sum(0),
                child.T @ fires,
            ]
            parts = [part.double() for part in parts]
            totals = parts if totals is None else [a.add_(b) for a, b in zip(totals, parts, strict=True)]
        self.samples = samples
        f, ff, a, aa, fa, self.on, self.fires, self.both, self.child, self.fires_with_child = totals
        deviations = ((ff - f * f / samples).sqrt(), (aa - a * a / samples).clamp(min=0).sqrt())
        self.correlation = (fa - f.outer(a) / samples) / deviations[0].outer(deviations[1])
        self.correlation.nan_to_num_(0, 0, 0)  # constant features and latents have no correlation


@torch.no_grad()
def encode(sae: SAEModel, x: Tensor) -> Tensor:
    """Return the activations `(N, L)`; under selection "mask" those of a width are the first ones."""
    pairs = sae.encode_pairs(x)
    return pairs.index.spread(pairs.values.float())


def assign(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and latents `(M,)` of the pairs with the largest sum of absolute correlations `(F, L)`."""
    features, latents = linear_sum_assignment(correlation.abs().numpy(), maximize=True)
    return torch.from_numpy(features), torch.from_numpy(latents)


@torch.no_grad()
def recovery(
    model: SyntheticModel, sae: SAEModel, widths: Sequence[int] | None = None, samples: int = SAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Measure the features that each width recovers.

    Args:
        model ([`SyntheticModel`]): Source of the hidden states.
        sae ([`SAEModel`]): SAE of raw hidden states.
        widths (`Sequence[int]`, *optional*): Widths to measure; by default the SAE's prefix widths.
        samples (`int`, *optional*, defaults to 20,000): Samples to match latents on, and as many to measure them on.
        seed (`int`, *optional*, defaults to 0): Seed of the samples.

    Returns:
        `list[dict]`: For each width `mcc`, the mean correlation of matched pairs; `f1`, `precision` and `recall` of a
        latent's firing as a predictor of its feature, means over matched pairs; `cosine` of their directions;
        `found`: number of features with a latent of F1 at least 0.8; `uniqueness`: share of different features among
        those with which the latents that fire correlate most; `parents_fire`: P(the latent of a feature with children
        fires | one of them is on), a mean over those that have a latent (`None` without); `l0`; and `f1_by_decile`:
        means over tenths of all features, the most frequent first, 0 for features without a latent.

    Raises:
        `ValueError`: if the SAE does not fit the model, or for bad widths or fewer than 2 samples.
    """
    if sae.config.d_in != model.world.d_in:
        raise ValueError(f"The synthetic model has width {model.world.d_in}, the SAE takes {sae.config.d_in}.")
    if samples < 2:
        raise ValueError(f"`samples` must be at least 2, got {samples}.")
    widths = checked_widths(widths, sae)
    parents = sorted({parent for parent in model.parents if parent >= 0})
    matched_on = _Sums(model, sae, samples, seed)
    sums = _Sums(model, sae, samples, derived_seed(seed, "measure"), parents)
    cosines = model.directions @ normalize(sae.W_dec.float(), dim=1).T
    return [_row(model, matched_on.correlation[:, :width], sums, cosines, parents, width) for width in widths]


def _row(
    model: SyntheticModel, correlation: Tensor, sums: _Sums, cosines: Tensor, parents: list[int], width: int
) -> dict[str, Any]:
    features, latents = assign(correlation)
    both, on, fires = sums.both[features, latents], sums.on[features], sums.fires[latents]
    f1 = 2 * both / (on + fires).clamp(min=1)
    every = torch.zeros(model.num_features, dtype=torch.float64)
    every[features] = f1
    alive = sums.fires[:width] > 0
    best = correlation.abs().argmax(0)[alive]
    place = dict(zip(features.tolist(), latents.tolist(), strict=True))
    firing = [
        (sums.fires_with_child[number, place[parent]] / sums.child[number]).item()
        for number, parent in enumerate(parents)
        if parent in place and sums.child[number]
    ]
    return {
        "width": width,
        "mcc": sums.correlation[features, latents].abs().mean().item(),
        "f1": f1.mean().item(),
        "precision": (both / fires.clamp(min=1)).mean().item(),
        "recall": (both / on.clamp(min=1)).mean().item(),
        "cosine": cosines[features, latents].abs().mean().item(),
        "found": int((f1 >= 0.8).sum()),
        "uniqueness": len(best.unique()) / max(1, len(best)),
        "parents_fire": sum(firing) / len(firing) if firing else None,
        "l0": (sums.fires[:width].sum() / sums.samples).item(),
        "f1_by_decile": [part.mean().item() for part in every.tensor_split(_DECILES) if len(part)],
    }


@torch.no_grad()
def supervised_sae(model: SyntheticModel, samples: int = SAMPLES, seed: int = 0) -> JumpReLUSAE:
    """Build an SAE from the features themselves: the ceiling for trained ones.

    Decoder rows are the features' directions; each latent is the least-squares estimate of its feature's magnitude
    from the hidden state, above the threshold of largest F1.

    Args:
        model ([`SyntheticModel`]): Model with known features.
        samples (`int`, *optional*, defaults to 20,000): Samples that it is fitted to.
        seed (`int`, *optional*, defaults to 0): Seed of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    config = JumpReLUSAEConfig(d_in=model.world.d_in, num_latents=model.num_features, apply_b_dec_to_input=False)
    sae = JumpReLUSAE(config).eval()
    features, x = model.sample(samples, generator)
    inputs = torch.cat([x, torch.ones(samples, 1)], 1).double()
    gram = inputs.T @ inputs + 1e-6 * samples * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, inputs.T @ features.double()).float()
    sae.W_dec.copy_(model.directions)
    sae.b_dec.copy_(model.bias)
    sae.W_enc.copy_(weights[:-1].T)
    sae.b_enc.copy_(weights[-1])
    for part in torch.arange(model.num_features).split(max(1, _BLOCK_ENTRIES // samples)):
        estimates = x @ sae.W_enc[part].T + sae.b_enc[part]
        sae.threshold[part] = _best_thresholds(estimates, features[:, part] > 0)
    return sae


def _best_thresholds(estimates: Tensor, on: Tensor) -> Tensor:
    """Return for each column of `(N, F)` the positive threshold above which F1 is largest."""
    values, order = estimates.sort(dim=0, descending=True)
    hits = on.gather(0, order).cumsum(0)
    predicted = torch.arange(1, len(values) + 1)[:, None]
    f1 = (2 * hits / (predicted + on.sum(0))).masked_fill(values <= 0, -1)
    last = f1.argmax(0, keepdim=True)
    following = values.gather(0, (last + 1).clamp(max=len(values) - 1))
    return ((values.gather(0, last) + following) / 2).clamp(min=0)[0]
