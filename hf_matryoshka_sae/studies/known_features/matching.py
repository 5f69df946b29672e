"""Match the latents of a toy model with its features, and measure how well they represent them.

Over samples, features and latents are divided by their largest value; the similarity of a feature and a latent is
their inner product, and the assignment with the largest sum wins (Hungarian method; noanabeshima/matryoshka-saes).

Shapes: N samples, F features, L latents, D width.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ...models import SAEModel
from .model import ToyModel


MATCHING_SAMPLES = 1000
MEASURING_SAMPLES = 50_000

RECOVERED_COSINE = 0.9
RECOVERED_RATE = 0.95


@dataclass
class Match:
    """Latents in the order of the features they were matched with.

    Args:
        latents (`list[int]`): The latent of each feature.
        similarity (`Tensor` of shape `(F, L)`): Mean of each latent, as a share of its largest value, over the samples
            where a feature is on; matched latents first, in the features' order.
        together (`Tensor` of shape `(F, F)`): Share of the samples where a feature (row) is on in which another
            (column) is too: what `similarity` would be if every latent were its feature.
        cosine (`Tensor` of shape `(F, L)`): Cosines of directions and decoder rows, in the same order.
        correlation (`list[float]`): Pearson's correlation of each feature with its latent.
        recall (`list[float]`): P(the latent fires | the feature is on).
        precision (`list[float]`): P(the feature is on | the latent fires).
        parent_fires (`dict[int, float]`): For each feature with children: P(its latent fires | a child is on).
        l0 (`float`): Mean number of latents that fire on a sample.
        fvu (`float`): Fraction of variance unexplained by all latents.
    """

    latents: list[int]
    similarity: Tensor
    together: Tensor
    cosine: Tensor
    correlation: list[float]
    recall: list[float]
    precision: list[float]
    parent_fires: dict[int, float]
    l0: float
    fvu: float

    @property
    def mcc(self) -> float:
        """Mean correlation coefficient over features."""
        return sum(self.correlation) / len(self.correlation)

    @property
    def mean_max_cosine(self) -> float:
        """Mean over features of the largest cosine of any decoder row."""
        return self.cosine.max(1).values.mean().item()

    @property
    def recovered(self) -> list[bool]:
        """Whether each feature's latent fires where it should (recall and precision 0.95) and points there (0.9)."""
        cosines = self.cosine.diagonal().tolist()
        return [
            cosine >= RECOVERED_COSINE and min(recall, precision) >= RECOVERED_RATE
            for cosine, recall, precision in zip(cosines, self.recall, self.precision, strict=True)
        ]

    @property
    def parents_fire(self) -> float | None:
        """Mean of `parent_fires`; `None` for a tree without parents."""
        return sum(self.parent_fires.values()) / len(self.parent_fires) if self.parent_fires else None

    def summary(self, names: list[str]) -> dict:
        """Return the numbers for a JSON file; `names` are those of the features."""
        return {
            "mean_max_cosine": self.mean_max_cosine,
            "mcc": self.mcc,
            "recovered": sum(self.recovered),
            "parents_fire": self.parents_fire,
            "parent_fires": {names[i]: rate for i, rate in self.parent_fires.items()},
            "l0": self.l0,
            "fvu": self.fvu,
            "features": [
                {
                    "name": name,
                    "latent": latent,
                    "cosine": self.cosine[i, i].item(),
                    "correlation": self.correlation[i],
                    "recall": self.recall[i],
                    "precision": self.precision[i],
                    "recovered": self.recovered[i],
                }
                for i, (name, latent) in enumerate(zip(names, self.latents, strict=True))
            ],
        }


@torch.no_grad()
def match(model: ToyModel, sae: SAEModel, seed: int = 0) -> Match:
    """Match a trained SAE with the features of its data, and measure it on new samples.

    Args:
        model ([`ToyModel`]): Toy model that the SAE was trained on.
        sae ([`SAEModel`]): SAE of raw hidden states with at least as many latents as features.
        seed (`int`, *optional*, defaults to 0): Seed of the samples.

    Raises:
        `ValueError`: if the SAE does not fit the toy model.
    """
    if sae.config.d_in != model.directions.shape[1]:
        raise ValueError(f"The toy model has width {model.directions.shape[1]}, the SAE takes {sae.config.d_in}.")
    generator = torch.Generator().manual_seed(seed)
    features, x = model.sample(MATCHING_SAMPLES, generator)
    latents = assign(features, sae.encode(x).to_dense())
    order = latents + sorted(set(range(sae.config.num_latents)) - set(latents))
    features, x = model.sample(MEASURING_SAMPLES, generator)
    encoded = sae.encode(x)
    activations = encoded.to_dense()[:, order]
    matched = activations[:, : features.shape[1]]
    on, fires = features > 0, matched > 0
    both = (on & fires).sum(0)
    where_on = features.T / on.sum(0).clamp(min=1)[:, None]  # its product with values: means where a feature is on
    children = {i: model.tree.children(i) for i in range(features.shape[1])}
    error = (sae.decode(encoded) - x).square().sum() / (x - x.mean(0)).square().sum()
    return Match(
        latents=latents,
        similarity=where_on @ _scaled(activations),
        together=where_on @ features,
        cosine=normalize(model.directions, dim=1) @ normalize(sae.W_dec, dim=1)[order].T,
        correlation=_correlation(features, matched),
        recall=_share(both, on.sum(0)),
        precision=_share(both, fires.sum(0)),
        parent_fires={
            i: fires[on[:, below].any(1), i].float().mean().item() for i, below in children.items() if below
        },
        l0=(activations > 0).sum(1).float().mean().item(),
        fvu=error.item(),
    )


def assign(features: Tensor, latents: Tensor) -> list[int]:
    """Return the latent of each feature in the one-to-one matching of largest similarity.

    Args:
        features (`Tensor` of shape `(N, F)`): Activations of the features.
        latents (`Tensor` of shape `(N, L)`): Activations of the latents on the same samples.

    Raises:
        `ValueError`: if there are fewer latents than features.
    """
    if latents.shape[1] < features.shape[1]:
        raise ValueError(f"{features.shape[1]} features need as many latents, got {latents.shape[1]}.")
    similarity = _scaled(features).T @ _scaled(latents)
    return linear_sum_assignment(similarity.numpy(), maximize=True)[1].tolist()


def _scaled(activations: Tensor) -> Tensor:
    return activations / activations.amax(0).clamp(min=1e-10)


def _share(part: Tensor, whole: Tensor) -> list[float]:
    return (part / whole.clamp(min=1)).tolist()


def _correlation(a: Tensor, b: Tensor) -> list[float]:
    """Return Pearson's correlation of the columns of `a` with those of `b`; 0 where one is constant."""
    a, b = (values.double() - values.double().mean(0) for values in (a, b))
    return cosine_similarity(a, b, dim=0).tolist()
