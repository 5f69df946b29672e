"""For each latent the few entries with the largest keys, kept while entries come in.

Which entries are kept follows from the keys alone, in whatever order they come, so that several processes together
keep what one would. A key is 64 bits: what entries are compared by, and below it the place of the token, so that no
two are equal and the earlier token wins.

Shapes: F latents, K places, C candidates.
"""

import torch
from torch import Tensor


MOST_POSITIONS = 2**32
"""Positions have 32 bits of a key."""


def value_keys(values: Tensor, positions: Tensor) -> Tensor:
    """Keys by which larger activations win. (The bits of positive float32 numbers are in their order.)"""
    bits = values.float().contiguous().view(torch.int32).long()
    return (bits << 32) | (MOST_POSITIONS - 1 - positions)


def random_keys(positions: Tensor, seed: int) -> Tensor:
    """Keys by which a random sample wins: a hash of the position and the seed (the finaliser of splitmix64)."""
    mixed = positions + ((seed + 1) * 0x1E3779B97F4A7C15 & (2**63 - 1))
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    mixed = (mixed ^ _shifted(mixed, 31)) & 0x7FFFFFFF
    return (mixed << 32) | (MOST_POSITIONS - 1 - positions)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shifted right, with zeros coming in."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)


def key_values(keys: Tensor) -> Tensor:
    """The activations of [`value_keys`]."""
    return (keys >> 32).int().view(torch.float32)


def key_positions(keys: Tensor) -> Tensor:
    """The positions of either kind of key."""
    return MOST_POSITIONS - 1 - (keys & (MOST_POSITIONS - 1))


class Best:
    """The K largest keys of each latent, with what belongs to each entry.

    Args:
        num_latents (`int`): F.
        count (`int`): K.
        payload (`dict[str, tuple[int, torch.dtype]]`, *optional*): Width and type of what goes with an entry.
        device (`torch.device`, *optional*): Where they are.

    Attributes:
        keys (`Tensor` of shape `(F, K)`): int64, in no order; -1 where a place is free.
        payload (`dict[str, Tensor]`): `(F, K, width)` each.
    """

    def __init__(
        self,
        num_latents: int,
        count: int,
        payload: dict[str, tuple[int, torch.dtype]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.keys = torch.full((num_latents, count), -1, dtype=torch.int64, device=device)
        self._limit = self.keys.new_full((num_latents,), -1)
        self.payload = {
            name: torch.zeros(num_latents, count, width, dtype=dtype, device=device)
            for name, (width, dtype) in (payload or {}).items()
        }

    def passing(self, cols: Tensor, keys: Tensor) -> Tensor:
        """Which candidates `(C,)` have a chance: those above the smallest key of a latent that has K already."""
        return (keys > self._limit[cols]).nonzero().squeeze(1)

    def take(self, cols: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Put candidates that belong to the K largest into places; write their payload to the same.

        Args:
            cols (`Tensor` of shape `(C,)`), keys (`Tensor` of shape `(C,)`): Latent and key of each candidate.

        Returns:
            Which candidates were taken, and their places among K.
        """
        count = self.keys.shape[1]
        order = keys.argsort(descending=True)
        order = order[cols[order].argsort(stable=True)]
        latents, row, sizes = cols[order].unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[row]
        chance = (rank < count).nonzero().squeeze(1)
        order, row, rank = order[chance], row[chance], rank[chance]
        old = self.keys[latents]
        new = torch.full_like(old, -1)
        new[row, rank] = keys[order]
        cut = torch.cat([old, new], 1).topk(count, dim=1, sorted=False).values.amin(1)
        free = (old < cut[:, None]) | (old < 0)
        places = (~free).to(torch.uint8).argsort(dim=1, stable=True)  # free places first
        chosen = (keys[order] >= cut[row]).nonzero().squeeze(1)
        order, row, rank = order[chosen], row[chosen], rank[chosen]
        place = places[row, rank]
        self.keys[latents[row], place] = keys[order]
        self._limit[latents] = self.keys[latents].amin(1)
        return order, place

    def write(self, cols: Tensor, places: Tensor, **payload: Tensor) -> None:
        """What belongs to the entries of some latents and places."""
        for name, rows in payload.items():
            self.payload[name][cols, places] = rows.to(self.payload[name].dtype)

    def in_order(self) -> "Best":
        """The same with the largest key first, so that nothing tells in which order entries came."""
        order = self.keys.argsort(dim=1, descending=True)
        ordered = Best(*self.keys.shape, device=self.keys.device)
        ordered.keys = self.keys.gather(1, order)
        ordered._limit = self._limit
        ordered.payload = {name: rows.gather(1, order[..., None].expand_as(rows)) for name, rows in self.payload.items()}
        return ordered

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {"keys": self.keys, **self.payload}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the place of a state."""
        self.keys.copy_(state["keys"])
        self._limit = self.keys.amin(1)
        for name, rows in self.payload.items():
            rows.copy_(state[name])

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add another process's."""
        device = self.keys.device
        cols, places = (state["keys"] >= 0).nonzero(as_tuple=True)
        if not len(cols):
            return
        chosen, place = self.take(cols.to(device), state["keys"][cols, places].to(device))
        cols, places = cols[chosen.cpu()], places[chosen.cpu()]
        self.write(cols.to(device), place, **{name: state[name][cols, places].to(device) for name in self.payload})
