"""Sizes and folder of a feature index; imported before torch."""

from dataclasses import asdict, dataclass

from ..common.checks import check_at_least


FOLDER = "features"
"""The folder of an index, beside the weights."""


@dataclass(frozen=True)
class IndexSizes:
    """How much an index keeps of each latent."""

    top_contexts: int = 16
    """Number of contexts in which the latent fires most strongly."""
    quantiles: int = 5
    """Number of quantiles of activation from which contexts are kept."""
    quantile_contexts: int = 4
    """Largest number of contexts from each quantile."""
    sampled_contexts: int = 32
    """Number of random contexts from which those of the quantiles are chosen."""
    band_contexts: int = 3
    """Number of contexts kept for each band of activation, those of other kinds among them."""
    context_tokens: int = 32
    """Tokens in a context."""
    tokens_of_vocabulary: int = 10
    """Number of most promoted tokens, and of most suppressed ones."""
    neighbours: int = 8
    """Number of latents with the most similar decoder rows."""
    cofiring: int = 8
    """Number of latents that fire with it most often."""
    cofiring_tokens: int = 64
    """Number of its tokens that are sampled to find latents that fire with it."""

    def check(self) -> None:
        """Raise `ValueError` for a size below 1, or below 0 where nothing of a kind may be kept."""
        for name, value in asdict(self).items():
            least = (
                0
                if name in ("tokens_of_vocabulary", "neighbours", "cofiring", "quantile_contexts", "band_contexts")
                else 1
            )
            check_at_least(least, **{name: value})
