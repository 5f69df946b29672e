"""Find latents that fire together, from a random sample of the tokens on which each latent fires.

Counts of all pairs of latents would be F x F numbers, and as many additions as there are pairs of latents on each
token. Instead each latent keeps T of its tokens, those of smallest hash, and for every token that some latent keeps
there is one list of what fires on it. Rates are therefore exact for latents that fire T times or fewer, and have a
standard error of at most `0.5 / sqrt(T)` for others, however rare they are.

Shapes: F latents, T tokens of a latent, P kept tokens.
"""

import torch
from torch import Tensor

from ..firings import Firings
from .best import Best, key_positions, random_keys


_ENTRIES_AT_ONCE = 2**22
_SPARE = 2**20  # entries of lists no longer needed, before they are deleted


class TokenSample:
    """A sample of each latent's tokens, and the latents that fire on them.

    Args:
        num_latents (`int`): Number F of latents.
        count (`int`): Number T of tokens of a latent.
        seed (`int`): Seed of the sample.
        device (`torch.device`, *optional*): Device of the tensors.
    """

    def __init__(self, num_latents: int, count: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.best, self.seed = Best(num_latents, count, device=device), seed
        self.positions = torch.zeros(0, dtype=torch.int64, device=device)
        self.sizes = torch.zeros(0, dtype=torch.int64, device=device)
        self.lists = torch.zeros(0, dtype=torch.int32, device=device)
        self._needed = 0  # entries after the last clearing

    def add(self, firings: Firings) -> None:
        """Add tokens; none may come twice."""
        token_keys = random_keys(firings.positions, self.seed)
        keys = token_keys[firings.rows]
        candidates = self.best.passing(firings.cols, keys)
        if not len(candidates):
            return
        chosen, _ = self.best.take(firings.cols[candidates], keys[candidates])
        needed = torch.zeros(len(firings.tokens), dtype=torch.bool, device=keys.device)
        needed[firings.rows[candidates[chosen]]] = True
        sizes = torch.bincount(firings.rows, minlength=len(needed))
        lists = firings.cols[needed[firings.rows]].int()
        self._append(key_positions(token_keys[needed]), sizes[needed], lists)

    def _append(self, positions: Tensor, sizes: Tensor, lists: Tensor) -> None:
        self.positions = torch.cat([self.positions, positions])
        self.sizes = torch.cat([self.sizes, sizes])
        self.lists = torch.cat([self.lists, lists])
        if len(self.lists) > 2 * self._needed + _SPARE:
            self.clear()

    def clear(self) -> None:
        """Delete the lists of tokens that no latent keeps any more, and sort the others by position."""
        positions = key_positions(self.best.keys[self.best.keys >= 0]).unique()
        rows = torch.isin(self.positions, positions).nonzero().squeeze(1)
        rows = rows[self.positions[rows].argsort()]
        self.lists = self.lists[_places(self.sizes, rows)]
        self.positions, self.sizes = self.positions[rows], self.sizes[rows]
        self._needed = len(self.lists)

    def strongest(self, count: int) -> tuple[Tensor, Tensor]:
        """Return for each latent the latents that fire on most of its tokens, `(F, n)`, and on which share of them.

        `n` is `count`, at most F - 1. Where fewer latents fire with it, entries are -1 with a rate of 0. Of equal
        shares the lower latent comes first.
        """
        self.clear()
        num_latents = len(self.best.keys)
        count = min(count, num_latents - 1)
        latents_by_block, rates = [], []
        block = max(1, _ENTRIES_AT_ONCE // num_latents)
        for start in range(0, num_latents if count else 0, block):
            keys = self.best.keys[start : start + block]
            counts = self._counts(keys)
            own = torch.arange(len(keys), device=keys.device)
            counts[own, start + own] = 0
            ranked = counts * num_latents + torch.arange(num_latents - 1, -1, -1, device=keys.device)
            best = ranked.topk(count, dim=1).values
            together, latents = best // num_latents, num_latents - 1 - best % num_latents
            latents_by_block.append(torch.where(together > 0, latents, -1))
            rates.append(together / (keys >= 0).sum(1, keepdim=True).clamp(min=1))
        if not latents_by_block:
            empty = self.best.keys[:, :0]
            return empty, empty.double()
        return torch.cat(latents_by_block), torch.cat(rates)

    def _counts(self, keys: Tensor) -> Tensor:
        """Count on how many of the tokens of some latents each latent fires, `(len(keys), F)`."""
        num_latents = len(self.best.keys)
        latents, slots = (keys >= 0).nonzero(as_tuple=True)
        rows = torch.searchsorted(self.positions, key_positions(keys[latents, slots]))
        total = torch.zeros(len(keys) * num_latents, dtype=torch.int64, device=keys.device)
        sizes = self.sizes[rows]
        # Tokens are taken in parts with a bounded number of latents on them, so that memory is bounded.
        parts = sizes.cumsum(0) // _ENTRIES_AT_ONCE
        for part in range(int(parts[-1]) + 1 if len(parts) else 0):
            mine = (parts == part).nonzero().squeeze(1)
            places = latents[mine].repeat_interleave(sizes[mine]) * num_latents
            places = places + self.lists[_places(self.sizes, rows[mine])]
            total += torch.bincount(places, minlength=len(total))
        return total.view(len(keys), num_latents)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"keys": self.best.keys, "positions": self.positions, "sizes": self.sizes, "lists": self.lists}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state into these tensors."""
        self.best.load_state_dict(state)
        for name in ("positions", "sizes", "lists"):
            setattr(self, name, state[name].to(self.best.keys.device))

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the sample of another process."""
        self.best.merge(state)
        device = self.best.keys.device
        self._append(*(state[name].to(device) for name in ("positions", "sizes", "lists")))


def _places(sizes: Tensor, rows: Tensor) -> Tensor:
    """Return the indices of the entries of some lists, one list after the other."""
    begins = sizes.cumsum(0) - sizes
    chosen = sizes[rows]
    offsets = torch.arange(int(chosen.sum()), device=sizes.device)
    offsets = offsets - (chosen.cumsum(0) - chosen).repeat_interleave(chosen)
    return begins[rows].repeat_interleave(chosen) + offsets
