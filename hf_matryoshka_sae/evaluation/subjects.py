"""Subjects of an evaluation: anything that reconstructs hidden states at several widths."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..models import SAEModel
from ..models.sharding import Layout, all_sum
from ..models.sparse_ops import LatentPairs
from .firing import FiringSums


class Subject(Protocol):
    """A dictionary or a baseline."""

    widths: list[int]

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return reconstructions `(P, N, D)` of hidden states `(N, D)`, one for each of `widths`."""
        ...


class Dictionary:
    """An SAE at a list of widths.

    Args:
        sae ([`SAEModel`]): The SAE in `eval` mode, for raw hidden states.
        widths (`Sequence[int]`, *optional*): Any widths up to F; by default the SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"mask"`): `"mask"` encodes once and drops latents past a width;
            `"restrict"` lets latents compete inside the width alone, which for TopK and for refined codes means
            encoding at each width. For all others the two are the same.

    Raises:
        `ValueError`: for widths that the SAE does not have, or a transcoder, which reconstructs another place.
    """

    def __init__(self, sae: SAEModel, widths: Sequence[int] | None = None, selection: str = "mask") -> None:
        num_latents = sae.config.num_latents
        if sae.config.output_hookpoint not in (None, sae.config.hookpoint):
            raise ValueError(
                f"This is a transcoder: from {sae.config.hookpoint} it predicts {sae.config.output_hookpoint}, and "
                "what is measured here is how well an SAE reconstructs the hidden states it reads."
            )
        self.sae = sae.eval()
        self.widths = sorted(set(sae.prefix_widths if widths is None else widths))
        if not self.widths or self.widths[0] < 1 or self.widths[-1] > num_latents:
            raise ValueError(f"`widths` must lie between 1 and {num_latents}, got {list(widths or [])}.")
        if selection not in ("mask", "restrict"):
            raise ValueError(f"`selection` must be 'mask' or 'restrict', got {selection!r}.")
        self.selection = selection
        alone = sae.config.activation_name == "topk" or sae.config.refine_steps > 0
        self.encodes_once = selection == "mask" or not alone
        self.firing = [FiringSums(num_latents) for _ in self.encodings]

    @property
    def encodings(self) -> list[list[int]]:
        """Return the widths that are read off each encoding: all of them, or one each."""
        return [self.widths] if self.encodes_once else [[width] for width in self.widths]

    def check(self, name: str, states: Tensor) -> None:
        """Raise `ValueError` for hidden states `(N, D)` of another width than the SAE's, which has this name."""
        d_in = self.sae.config.d_in
        if states.shape[1] != d_in:
            raise ValueError(f"`{name}` takes hidden states of width d_in = {d_in}, got {tuple(states.shape)}.")

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[LatentPairs]:
        """Return the latents of `(N, D)` hidden states: once for all widths, or at each of them."""
        x = x.to(self.sae.W_enc)
        if self.encodes_once:
            return [self.sae.encode_pairs(x)]
        return [self.sae.encode_pairs(x, width) for width in self.widths]

    @torch.no_grad()
    def decode(self, pairs: list[LatentPairs]) -> Tensor:
        """Return the reconstructions `(P, N, D)` from the latents of [`encode`]."""
        if self.encodes_once:
            return self.sae.decode_pairs(pairs[0], self.widths)
        each = zip(pairs, self.widths, strict=True)
        return torch.cat([self.sae.decode_pairs(part, [width]) for part, width in each])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction at each width, `(P, N, D)`."""
        return self.decode(self.encode(x))

    def count(self, pairs: list[LatentPairs]) -> None:
        """Count the latents that fire in a batch."""
        for sums, part in zip(self.firing, pairs, strict=True):
            sums.add(part)

    def firing_rows(self) -> list[dict[str, float]]:
        """Return L0, L1 and dead share at each width, of what was counted in all processes."""
        each = zip(self.firing, self.encodings, strict=True)
        return [row for sums, widths in each for row in sums.reduce().rows(widths)]


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
