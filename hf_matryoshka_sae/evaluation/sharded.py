"""A dictionary whose latents lie on several processes, evaluated by all of them on the same tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import SAEModel
from ..models.sharding import Layout, all_sum
from ..models.sparse_ops import LatentPairs
from .firing import FiringSums
from .subjects import Dictionary


class ShardedDictionary(Dictionary):
    """Part of an SAE, with the results of the whole under selection `"mask"`.

    All shards of a replica must see the same tokens: evaluate within [`among`] the replicas.

    Args:
        sae ([`SAEModel`]): The latents of this process, in `eval` mode, taking raw hidden states.
        layout ([`Layout`]): The processes, and which latents each has.
        widths (`Sequence[int]`): Prefix widths of the whole dictionary.
    """

    def __init__(self, sae: SAEModel, layout: Layout, widths: Sequence[int]) -> None:
        super().__init__(sae)
        self.layout, self.widths = layout, list(widths)

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[LatentPairs]:
        """Return this process's latents of `(N, D)` hidden states."""
        return [self.sae.encode_pairs(x.to(self.sae.W_enc), layout=self.layout)]

    @torch.no_grad()
    def decode(self, pairs: list[LatentPairs]) -> Tensor:
        """Return the reconstructions `(P, N, D)` of the whole dictionary."""
        bias = self.sae.b_dec
        own = self.sae.decode_pairs(pairs[0], self.layout.own_widths(self.widths)) - bias
        return all_sum(own, self.layout.shard_group) + bias

    def firing_rows(self) -> list[dict[str, float]]:
        """Return L0, L1 and dead share at each width, of what was counted in all processes."""
        start, stop = self.layout.rows
        own, whole = self.firing[0].reduce(), FiringSums(self.layout.num_latents)
        whole.tokens = own.tokens
        for counts, part in ((whole.fired, own.fired), (whole.moments, own.moments)):
            counts[..., start:stop] = part
            device = self.sae.b_dec.device
            counts.copy_(all_sum(counts.to(device), self.layout.shard_group))
        return whole.rows(self.widths)
