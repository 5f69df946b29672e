"""What is known of every latent while the text goes by, and how much of it is kept."""

from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from ...common.checks import check_at_least
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs
from ..firings import joined
from .cofiring import TokenSample
from .contexts import Contexts, Parts
from .sums import LatentSums
from .windows import Fired


TOKENS_AT_ONCE = 2**15  # whose pairs are looked at together
_ENTRIES_AT_ONCE = 2**24  # windows x latents, of the same


class Tree(Protocol):
    """What finds parents and children; see `EdgeSums`."""

    def add(self, pairs: LatentPairs) -> None: ...

    def reduce(self) -> None: ...

    def parents(self) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class IndexSizes:
    """How much an index keeps of each latent.

    Args:
        top_contexts (`int`, *optional*, defaults to 16): Contexts in which it fires most.
        quantiles (`int`, *optional*, defaults to 5): Parts of equal size into which its firings are cut, by strength.
        quantile_contexts (`int`, *optional*, defaults to 4): Contexts from each of them, at most.
        sampled_contexts (`int`, *optional*, defaults to 32): Random contexts from which those are chosen.
        context_tokens (`int`, *optional*, defaults to 32): Tokens shown of a context.
        tokens_of_vocabulary (`int`, *optional*, defaults to 10): Promoted, and suppressed, tokens.
        neighbours (`int`, *optional*, defaults to 8): Latents with similar decoder rows.
        cofiring (`int`, *optional*, defaults to 8): Latents that fire with it.
        cofiring_tokens (`int`, *optional*, defaults to 64): Of its tokens, sampled to find those.
    """

    top_contexts: int = 16
    quantiles: int = 5
    quantile_contexts: int = 4
    sampled_contexts: int = 32
    context_tokens: int = 32
    tokens_of_vocabulary: int = 10
    neighbours: int = 8
    cofiring: int = 8
    cofiring_tokens: int = 64

    def check(self) -> None:
        """Raises `ValueError` for a size below 1, or 0 where nothing of a kind may be kept."""
        for name, value in asdict(self).items():
            least = 0 if name in ("tokens_of_vocabulary", "neighbours", "cofiring", "quantile_contexts") else 1
            check_at_least(least, **{name: value})


class LatentPass(Parts):
    """What one process knows of every latent."""

    def __init__(self, sae: SAEModel, sizes: IndexSizes, context_length: int, seed: int, tree: Tree | None) -> None:
        latents, device = sae.config.num_latents, sae.W_enc.device
        width = min(sizes.context_tokens, context_length)
        self.sums = LatentSums(latents, device)
        self.contexts = Contexts(latents, sizes.top_contexts, sizes.sampled_contexts, width, seed, device)
        self.cofiring = TokenSample(latents, sizes.cofiring_tokens, seed, device)
        self.tree, self.num_latents = tree, latents
        self.parts = {"sums": self.sums, "contexts": self.contexts, "cofiring": self.cofiring}
        self.parts |= {"tree": tree} if hasattr(tree, "load_state_dict") else {}

    def batches_at_once(self, windows: int, context_length: int) -> int:
        """Batches in a chunk."""
        few = min(TOKENS_AT_ONCE // context_length, _ENTRIES_AT_ONCE // self.num_latents)
        return max(1, few // windows)

    def add(self, chunk: list[Fired]) -> None:
        """Look at some batches."""
        for batch in chunk:
            self.sums.add_first(batch.first, batch.first_counts)
            if self.tree is not None:
                self.tree.add(batch.firings.pairs)
        firings = joined([batch.firings for batch in chunk])
        self.sums.add(firings.cols, firings.values, sum(batch.tokens for batch in chunk))
        self.contexts.add(firings)
        self.cofiring.add(firings)

    @property
    def resumable(self) -> bool:
        """Whether all of it can be saved."""
        return self.tree is None or hasattr(self.tree, "load_state_dict")
