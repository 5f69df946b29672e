"""Defaults of `matryoshka-sae toy` and `synthetic`; imported before torch."""

from dataclasses import dataclass

from ...common.checks import check_at_least


TOY_STEPS, TOY_BATCH_SIZE = 40_000, 200
"""Training steps and samples in a step of the published run of the toy model."""
PUBLISHED_L0 = 1.2338  # target of the published run; the published tree's own L0 is 1.12

STEPS, BATCH_SIZE = 2000, 1024
"""Training steps and samples in a step on a synthetic world."""
SAMPLES = 20_000
"""Samples on which latents are matched with features, and as many on which they are measured."""


@dataclass
class World:
    """The numbers of a synthetic model. Raises `ValueError` for numbers out of range."""

    features: int = 512
    """Number F of known features. Where F is at most `d_in`, their directions are orthogonal; elsewhere random."""
    d_in: int = 128
    """Width D of the hidden states."""
    p_max: float = 0.4
    """Probability that the most frequent feature is on."""
    p_min: float = 5e-4
    """Probability that the rarest feature is on."""
    exponent: float = 0.5
    """Exponent of the power law by which probabilities fall from `p_max` to `p_min`."""
    trees: int = 16
    """Number of features at the top of a tree."""
    branching: int = 4
    """Number of children of each feature in a tree."""
    levels: int = 3
    """Number of levels of a tree, its top included."""
    exclusive: bool = True
    """Whether siblings exclude one another."""
    correlation: float = 0.0
    """Share of the variance of the Gaussian copula's variables that comes from common factors."""
    rank: int = 25
    """Number of common factors."""
    spread: float = 0.25
    """Standard deviation of magnitudes, whose mean is 1."""
    noise: float = 0.1
    """Root mean square length of the noise."""
    bias: float = 1.0
    """Length of the bias."""

    def __post_init__(self) -> None:
        counts = ("features", "d_in", "branching", "levels", "rank")
        check_at_least(1, **{name: getattr(self, name) for name in counts})
        if not 0 <= self.trees <= self.features:
            raise ValueError(f"`trees` must lie between 0 and `features` ({self.features}), got {self.trees}.")
        if not 0 < self.p_min <= self.p_max < 1:
            raise ValueError(f"Expected 0 < `p_min` <= `p_max` < 1, got {self.p_min} and {self.p_max}.")
        if not self.exponent > 0:
            raise ValueError(f"`exponent` must be above 0, got {self.exponent}.")
        if not 0 <= self.correlation < 1:
            raise ValueError(f"`correlation` must lie between 0 and below 1, got {self.correlation}.")
        for name in ("spread", "noise", "bias"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
