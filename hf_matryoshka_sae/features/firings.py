"""Where latents fire in a text: pairs of a token and a latent, over windows, from which contexts are made.

The index keeps some of each latent's while the text goes by; explanations keep all of a few latents.

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
    """What fires in some windows.

    Args:
        input_ids (`Tensor` of shape `(B, S)`): Tokens.
        numbers (`Tensor` of shape `(B,)`): Number of each window in the text.
        tokens (`Tensor` of shape `(N,)`): Place `window * S + position` of each token, in these windows.
        pairs ([`LatentPairs`]): What fires on them; values are positive.
    """

    input_ids: Tensor
    numbers: Tensor
    tokens: Tensor
    pairs: LatentPairs

    @classmethod
    def of(cls, input_ids: Tensor, first: int, tokens: Tensor, pairs: LatentPairs, chosen: Tensor) -> "Firings":
        """The `chosen` pairs, `(M,)` bool, of those above 0, in windows of which the first has the number `first`."""
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
        """By latent the places on which it fires, ascending, and its activations there, on the host."""
        order = self.cols.argsort(stable=True)
        cols, places, values = (each[order].cpu() for each in (self.cols, self.places, self.values.float()))
        begins, ends = (
            torch.searchsorted(cols, torch.tensor(latents), right=right).tolist() for right in (False, True)
        )
        parts = (slice(*bounds) for bounds in zip(begins, ends, strict=True))
        return {latent: (places[part], values[part]) for latent, part in zip(latents, parts, strict=True)}


def joined_pairs(parts: Sequence[LatentPairs]) -> LatentPairs:
    """The latents of several batches of tokens, one after the other."""
    if len(parts) == 1:
        return parts[0]
    sizes = [part.num_rows for part in parts]
    rows = torch.cat([part.rows + start for part, start in zip(parts, accumulate(sizes, initial=0), strict=False)])
    index = PairIndex(rows, torch.cat([part.cols for part in parts]), sum(sizes), parts[0].num_latents)
    return LatentPairs(index, torch.cat([part.values for part in parts]))


def joined(parts: Sequence[Firings]) -> Firings:
    """Several batches of windows as one."""
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
    """Where a context around a position of a window begins and ends.

    Args:
        inside (`np.ndarray` of shape `(S,)`): bool; a context does not reach over a position where it is false.
        position (`int`): What it is around; in it whatever `inside` says.
        before (`int`), after (`int`): Tokens on either side, at most.
    """
    start, stop = max(0, position - before), min(len(inside), position + after + 1)
    left, right = np.flatnonzero(~inside[start:position]), np.flatnonzero(~inside[position + 1 : stop])
    start = start + int(left[-1]) + 1 if len(left) else start
    return start, position + 1 + int(right[0]) if len(right) else stop


def values_of(pairs: LatentPairs, latents: Tensor) -> Tensor:
    """Activations of a few latents on all tokens, `(N, n)` in float32 on the host.

    Args:
        pairs ([`LatentPairs`]): Of N tokens.
        latents (`Tensor` of shape `(n,)`): Different latents.
    """
    place = torch.full((pairs.num_latents,), -1)
    place[latents] = torch.arange(len(latents))
    column = place[pairs.cols.cpu()]
    there = column >= 0
    values = torch.zeros(pairs.num_rows, len(latents))
    values[pairs.rows.cpu()[there], column[there]] = pairs.values.detach().cpu()[there].float()
    return values
