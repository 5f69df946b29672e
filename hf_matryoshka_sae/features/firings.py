"""Where latents fire in a text: pairs of a token and a latent, over windows, from which contexts are made.

The index keeps a few firings of every latent; explanations keep every firing of a few latents.

Shapes: B windows, S tokens in a window, N tokens that are looked at, F latents, M pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..models.sparse_ops import LatentPairs, PairIndex


@dataclass
class Firings:
    """The latents that fire in some windows.

    Args:
        input_ids (`Tensor` of shape `(B, S)`): Token ids.
        numbers (`Tensor` of shape `(B,)`): Number of each window in the text.
        tokens (`Tensor` of shape `(N,)`): Place `window * S + position` of each token, in these windows.
        pairs ([`LatentPairs`]): Latents that fire on these tokens; values are positive.
    """

    input_ids: Tensor
    numbers: Tensor
    tokens: Tensor
    pairs: LatentPairs

    @classmethod
    def of(cls, input_ids: Tensor, first: int, tokens: Tensor, pairs: LatentPairs, chosen: Tensor) -> "Firings":
        """Take the `chosen` pairs `(M,)` with values above 0, in windows numbered from `first`."""
        numbers = first + torch.arange(len(input_ids), device=input_ids.device)
        chosen = chosen & (pairs.values > 0)
        return cls(input_ids, numbers, tokens, pairs if bool(chosen.all()) else pairs.keep(chosen))

    @property
    def rows(self) -> Tensor:
        """Token of each pair, `(M,)`, ascending."""
        return self.pairs.rows

    @property
    def cols(self) -> Tensor:
        """Latent of each pair, `(M,)`."""
        return self.pairs.cols

    @property
    def values(self) -> Tensor:
        """Activation of each pair, `(M,)`."""
        return self.pairs.values

    @property
    def positions(self) -> Tensor:
        """Position of each token in the whole text, `(N,)`."""
        length = self.input_ids.shape[1]
        return self.numbers[self.tokens // length] * length + self.tokens % length

    @property
    def places(self) -> Tensor:
        """Place `window * S + position` of each pair, in these windows, `(M,)`."""
        return self.tokens[self.rows]

    def of_latents(self, latents: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return for each latent the places on which it fires, ascending, and its activations there, on the host."""
        order = self.cols.argsort(stable=True)
        cols, places, values = (each[order].cpu() for each in (self.cols, self.places, self.values.float()))
        begins, ends = (
            torch.searchsorted(cols, torch.tensor(latents), right=right).tolist() for right in (False, True)
        )
        parts = (slice(*bounds) for bounds in zip(begins, ends, strict=True))
        return {latent: (places[part], values[part]) for latent, part in zip(latents, parts, strict=True)}


def joined_pairs(parts: Sequence[LatentPairs]) -> LatentPairs:
    """Concatenate the latents of several batches of tokens."""
    if len(parts) == 1:
        return parts[0]
    sizes = [part.num_rows for part in parts]
    rows = torch.cat([part.rows + start for part, start in zip(parts, accumulate(sizes, initial=0), strict=False)])
    index = PairIndex(rows, torch.cat([part.cols for part in parts]), sum(sizes), parts[0].num_latents)
    return LatentPairs(index, torch.cat([part.values for part in parts]))


def joined(parts: Sequence[Firings]) -> Firings:
    """Concatenate several batches of windows."""
    if len(parts) == 1:
        return parts[0]
    sizes = (part.input_ids.numel() for part in parts)
    return Firings(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.numbers for part in parts]),
        torch.cat([part.tokens + start for part, start in zip(parts, accumulate(sizes, initial=0), strict=False)]),
        joined_pairs([part.pairs for part in parts]),
    )


def span(inside: np.ndarray, position: int, before: int, after: int) -> tuple[int, int]:
    """Return begin and end of a context around a position of a window.

    Args:
        inside (`np.ndarray` of shape `(S,)`): bool; a context ends before a position where it is false.
        position (`int`): Position that the context is around; it is in the context even where `inside` is false.
        before (`int`): Largest number of tokens before the position.
        after (`int`): Largest number of tokens after it.
    """
    start, stop = max(0, position - before), min(len(inside), position + after + 1)
    breaks, later_breaks = np.flatnonzero(~inside[start:position]), np.flatnonzero(~inside[position + 1 : stop])
    start = start + int(breaks[-1]) + 1 if len(breaks) else start
    return start, position + 1 + int(later_breaks[0]) if len(later_breaks) else stop


def values_of(pairs: LatentPairs, latents: Tensor) -> Tensor:
    """Return the activations of a few latents on all tokens, `(N, n)` in float32 on the host.

    Args:
        pairs ([`LatentPairs`]): Latents that fire on N tokens.
        latents (`Tensor` of shape `(n,)`): Latents, each at most once.
    """
    place = torch.full((pairs.num_latents,), -1)
    place[latents] = torch.arange(len(latents))
    column = place[pairs.cols.cpu()]
    there = column >= 0
    values = torch.zeros(pairs.num_rows, len(latents))
    values[pairs.rows.cpu()[there], column[there]] = pairs.values.detach().cpu()[there].float()
    return values
