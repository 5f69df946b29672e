"""Synthetic hidden states of many known features: rare and frequent ones, trees, more features than dimensions.

After SynthSAEBench (arXiv 2602.14687), where 16,384 features lie in 768 dimensions. Feature i (from 1) is on with
probability

    p_i = p_min + (p_max - p_min) (i^-s - F^-s) / (1 - F^-s)

so that the first has p_max and the last p_min. The first `trees` features have children, each of which is on only
where its parent is, up to `levels` levels; siblings exclude one another. That changes no p_i: a child is on in a share
p_child / p_parent of its parent's samples, and children together in at most 0.8 of them. A feature that is on has a
magnitude, a Gaussian kept above 0; the hidden state is the sum of magnitudes times directions, plus bias and noise.

Features without a parent may be correlated, by a Gaussian copula of low rank, which changes no p_i either.

Shapes: N samples, F features, D `d_in`, C independent draws.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from ...common.seeds import derived_seed
from .settings import World


_FILL = 0.8  # a parent that always had a child on could not be distinguished from its children
_LEAST_MAGNITUDE = 0.1
_BLOCK_ENTRIES, _BLOCK_ROWS = 2**23, 20_000  # drawn at once: the cost of a draw does not depend on the batch


class SyntheticModel:
    """Features of a [`World`], with directions.

    Args:
        world ([`World`]): Numbers of the world.
        seed (`int`, *optional*, defaults to 0): Seed of directions, bias and correlations.

    Attributes:
        probabilities (`Tensor` of shape `(F,)`): Probability that each feature is on, descending.
        parents (`list[int]`): Parent of each feature, -1 for none.
        directions (`Tensor` of shape `(F, D)`): Directions of the features, unit rows.
        bias (`Tensor` of shape `(D,)`): Bias of the hidden states.
    """

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world = world
        generator = torch.Generator().manual_seed(derived_seed(seed, "world"))
        ranks = torch.arange(1, world.features + 1, dtype=torch.float64).pow(-world.exponent)
        span = (1 - ranks[-1]).clamp(min=1e-12)
        self.probabilities = world.p_min + (world.p_max - world.p_min) * (ranks - ranks[-1]) / span
        if world.features == 1:
            self.probabilities[:] = world.p_max
        self.directions = normalize(torch.randn(world.features, world.d_in, generator=generator), dim=1)
        if world.features <= world.d_in:
            self.directions = torch.linalg.qr(self.directions.T)[0].T.contiguous()
        self.bias = normalize(torch.randn(world.d_in, generator=generator), dim=0) * world.bias
        self.parents = [-1] * world.features
        # A feature is on where low <= u[column] < high, for one uniform number u per column, and its parent is on.
        self._column = torch.arange(world.features)
        self._low = torch.zeros(world.features, dtype=torch.float64)
        self._high = self.probabilities.clone()
        self._levels: list[Tensor] = []  # features with a parent, by their depth
        self._grow()
        tops = torch.tensor([i for i, parent in enumerate(self.parents) if parent < 0])
        loadings = torch.randn(len(tops), world.rank, generator=generator)
        self._loadings = normalize(loadings, dim=1) * world.correlation**0.5
        self._tops = tops

    @property
    def num_features(self) -> int:
        """Number of features F."""
        return len(self.probabilities)

    @property
    def expected_l0(self) -> float:
        """Mean number of features that are on in a sample."""
        return self.probabilities.sum().item()

    def children(self, feature: int) -> list[int]:
        """Return the children of a feature."""
        return [i for i, parent in enumerate(self.parents) if parent == feature]

    def _grow(self) -> None:
        """Give the first features children: the most frequent features that fit into a parent together."""
        world, p = self.world, self.probabilities.tolist()
        free = list(range(world.trees, world.features))
        above = list(range(world.trees))
        for _ in range(world.levels - 1):
            level: list[int] = []
            for parent in above:
                room = _FILL * p[parent] / world.branching
                first = next((place for place, feature in enumerate(free) if p[feature] <= room), len(free))
                children, free[first : first + world.branching] = free[first : first + world.branching], []
                start = 0.0
                for child in children:
                    self.parents[child] = parent
                    self._low[child], self._high[child] = start, start + p[child] / p[parent]
                    if world.exclusive:
                        self._column[child], start = children[0], start + p[child] / p[parent]
                level += children
            if level:
                self._levels.append(torch.tensor(sorted(level)))
            above = level

    def on(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample which features are on, `(N, F)` bool."""
        uniform = torch.rand(self.num_features, num_samples, generator=generator)
        if self.world.correlation:
            common = torch.randn(self.world.rank, num_samples, generator=generator)
            own = torch.randn(len(self._tops), num_samples, generator=generator)
            normal = self._loadings @ common + (1 - self.world.correlation) ** 0.5 * own
            uniform[self._tops] = torch.special.ndtr(normal)
        uniform = uniform[self._column]
        on = (uniform >= self._low.float()[:, None]) & (uniform < self._high.float()[:, None])
        parents = torch.tensor(self.parents)
        for level in self._levels:
            on[level] &= on[parents[level]]
        return on.T.contiguous()

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Sample magnitudes of features `(N, F)`, 0 where one is off, and the hidden states `(N, D)` of their sums."""
        world, on = self.world, self.on(num_samples, generator)
        rows, cols = on.nonzero(as_tuple=True)
        values = (1 + world.spread * torch.randn(len(rows), generator=generator)).clamp(min=_LEAST_MAGNITUDE)
        features = torch.zeros(on.shape)
        features[rows, cols] = values
        counts = on.sum(1)
        x = embedding_bag(cols, self.directions, counts.cumsum(0) - counts, mode="sum", per_sample_weights=values)
        noise = torch.randn(x.shape, generator=generator) * (world.noise / world.d_in**0.5)
        return features, x + self.bias + noise

    def batches(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Yield hidden states `(batch_size, D)` without end; equal for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        whole = max(1, min(_BLOCK_ROWS, _BLOCK_ENTRIES // self.num_features) // batch_size)
        while True:
            yield from self.sample(whole * batch_size, generator)[1].split(batch_size)
