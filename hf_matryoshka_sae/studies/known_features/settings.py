"""What `matryoshka-sae toy` and `synthetic` take where nothing is said; imported before torch."""

from dataclasses import dataclass

from ...common.checks import check_at_least


TOY_STEPS, TOY_BATCH_SIZE = 40_000, 200
"""Of the published run of the toy model."""
PUBLISHED_L0 = 1.2338  # of another tree: that of the published tree is 1.12

STEPS, BATCH_SIZE = 2000, 1024
"""Of training on a synthetic world."""
SAMPLES = 20_000
"""Hidden states that latents are matched with features on, and as many that they are measured on."""


@dataclass
class World:
    """The numbers that a synthetic model is made of. Raises `ValueError` for numbers out of range."""

    features: int = 512
    """Known features F. Where F is at most `d_in`, their directions are orthogonal; elsewhere random."""
    d_in: int = 128
    """Width D of the hidden states."""
    p_max: float = 0.4
    """How often the most frequent feature is on."""
    p_min: float = 5e-4
    """How often the rarest is on."""
    exponent: float = 0.5
    """Of the power law by which frequencies fall from `p_max` to `p_min`."""
    trees: int = 16
    """Features with others below them."""
    branching: int = 4
    """How many are right below each."""
    levels: int = 3
    """Levels of a tree, its top counted."""
    exclusive: bool = True
    """Whether siblings exclude one another."""
    correlation: float = 0.0
    """Share of the variance of the Gaussian copula's variables that comes from common ones."""
    rank: int = 25
    """How many common ones there are."""
    spread: float = 0.25
    """Standard deviation of magnitudes, of which the mean is 1."""
    noise: float = 0.1
    """Root mean square length of the noise."""
    bias: float = 1.0
    """Length of the bias."""

    def __post_init__(self):
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
