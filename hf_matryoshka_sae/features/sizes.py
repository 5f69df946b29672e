"""How much an index keeps, and where it lies; imported before torch."""

from dataclasses import asdict, dataclass

from ..common.checks import check_at_least


FOLDER = "features"
"""The folder of an index, beside the weights."""


@dataclass(frozen=True)
class IndexSizes:
    """How much an index keeps of each latent."""

    top_contexts: int = 16
    """Contexts in which it fires most."""
    quantiles: int = 5
    """Parts of equal size into which its firings are cut, by strength."""
    quantile_contexts: int = 4
    """Contexts from each of them, at most."""
    sampled_contexts: int = 32
    """Random contexts from which those are chosen."""
    context_tokens: int = 32
    """Tokens shown of a context."""
    tokens_of_vocabulary: int = 10
    """Promoted, and suppressed, tokens."""
    neighbours: int = 8
    """Latents with similar decoder rows."""
    cofiring: int = 8
    """Latents that fire with it."""
    cofiring_tokens: int = 64
    """Of its tokens, sampled to find those."""

    def check(self) -> None:
        """Raises `ValueError` for a size below 1, or 0 where nothing of a kind may be kept."""
        for name, value in asdict(self).items():
            least = 0 if name in ("tokens_of_vocabulary", "neighbours", "cofiring", "quantile_contexts") else 1
            check_at_least(least, **{name: value})
