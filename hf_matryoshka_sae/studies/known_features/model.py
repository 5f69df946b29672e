"""Toy hidden states from a tree of features: x = the sum of the directions of the features that are on."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...common.seeds import derived_seed
from .tree import FeatureTree


_NORM_SPREAD = 0.05
_BLOCK = 50_000  # rows drawn at once: the cost of a draw does not depend on the batch


class ToyModel:
    """A tree of features with a direction for each (noanabeshima/matryoshka-saes).

    Directions are the rows of an orthogonal matrix, each times 1 + 0.05 * N(0, 1). There is no noise and no bias, and
    D = F.

    Args:
        tree ([`FeatureTree`]): Tree that decides which features are on together.
        seed (`int`, *optional*, defaults to 0): Seed of the directions.

    Attributes:
        directions (`Tensor` of shape `(F, D)`): Direction of each feature.
    """

    def __init__(self, tree: FeatureTree, seed: int = 0) -> None:
        self.tree = tree
        generator = torch.Generator().manual_seed(derived_seed(seed, "directions"))
        size = tree.num_features
        rows, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        self.directions = rows * (1 + _NORM_SPREAD * torch.randn(size, 1, generator=generator))

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Sample features `(N, F)`, each 0 or 1, and the hidden states `(N, D)` they add up to."""
        features = self.tree.sample(num_samples, generator)
        return features, features @ self.directions

    def batches(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Yield hidden states `(batch_size, D)` without end; equal for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        whole = max(1, _BLOCK // batch_size)
        while True:
            yield from self.sample(whole * batch_size, generator)[1].split(batch_size)
