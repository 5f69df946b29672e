"""Sums and contexts of every latent, collected in one pass over the text."""

from typing import Protocol

import torch
from torch import Tensor

from ...models import SAEModel
from ...models.sparse_ops import LatentPairs
from ..bands import EDGES, BandSample
from ..firings import joined
from ..sizes import IndexSizes
from .cofiring import TokenSample
from .contexts import Contexts, Parts
from .sums import LatentSums
from .windows import Fired


TOKENS_AT_ONCE = 2**15  # tokens whose pairs are added together
_ENTRIES_AT_ONCE = 2**24  # largest number of windows x latents added together


class Tree(Protocol):
    """Sums from which parents and children of latents are derived; see `EdgeSums`."""

    def add(self, pairs: LatentPairs) -> None:
        """Add the latents of some tokens."""

    def reduce(self) -> None:
        """Add up over processes."""

    def parents(self) -> tuple[Tensor, Tensor]:
        """Return each latent's parent, -1 for none, and the score of the best candidate."""


class LatentPass(Parts):
    """All sums and contexts of one process."""

    def __init__(self, sae: SAEModel, sizes: IndexSizes, context_length: int, seed: int, tree: Tree | None) -> None:
        latents, device = sae.config.num_latents, sae.W_enc.device
        width = min(sizes.context_tokens, context_length)
        self.sums = LatentSums(latents, device)
        spread = sizes.band_contexts * (len(EDGES) - 2)
        self.contexts = Contexts(latents, sizes.top_contexts, sizes.sampled_contexts, spread, width, seed, device)
        self.bands = BandSample(latents, seed, device)
        self.cofiring = TokenSample(latents, sizes.cofiring_tokens, seed, device)
        self.tree, self.num_latents = tree, latents
        self.parts = {"sums": self.sums, "contexts": self.contexts, "cofiring": self.cofiring}
        self.parts |= {"bands": self.bands}
        self.parts |= {"tree": tree} if hasattr(tree, "load_state_dict") else {}

    def batches_at_once(self, windows: int, context_length: int) -> int:
        """Return the number of batches that are added together."""
        few = min(TOKENS_AT_ONCE // context_length, _ENTRIES_AT_ONCE // self.num_latents)
        return max(1, few // windows)

    def add(self, chunk: list[Fired]) -> None:
        """Add some batches."""
        for batch in chunk:
            self.sums.add_first(batch.first, batch.first_counts)
            if self.tree is not None:
                self.tree.add(batch.firings.pairs)
        firings = joined([batch.firings for batch in chunk])
        self.sums.add(firings.cols, firings.values, sum(batch.tokens for batch in chunk))
        self.contexts.add(firings)
        self.cofiring.add(firings)
        self.bands.add(firings, torch.cat([batch.counted for batch in chunk]))

    @property
    def resumable(self) -> bool:
        """Whether all parts can be saved."""
        return self.tree is None or hasattr(self.tree, "load_state_dict")
