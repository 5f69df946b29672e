"""For each latent the few entries with the largest keys, kept while entries come in.

Which entries are kept follows from the keys alone, in whatever order they come, so that several processes together
keep what one would. A key is 64 bits: what entries are compared by, and below it the place of the token, so that no
two are equal and the earlier token wins.

Shapes: F latents, K places, C candidates.
"""

import torch
from torch import Tensor


MOST_POSITIONS = 2**32
"""Number of positions that a key can hold: 32 bits of it."""

_ABOVE_ZERO = 512.0  # logarithms plus this are positive, as keys sort by the bits of positive numbers


def value_keys(values: Tensor, positions: Tensor) -> Tensor:
    """Return keys by which larger activations win; the bits of positive float32 numbers sort as the numbers do."""
    bits = values.float().contiguous().view(torch.int32).long()
    return (bits << 32) | (MOST_POSITIONS - 1 - positions)


def random_keys(positions: Tensor, seed: int) -> Tensor:
    """Return keys by which a random sample wins: hashes of position and seed (the finaliser of splitmix64)."""
    mixed = positions + ((seed + 1) * 0x1E3779B97F4A7C15 & (2**63 - 1))
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    mixed = (mixed ^ _shifted(mixed, 31)) & 0x7FFFFFFF
    return (mixed << 32) | (MOST_POSITIONS - 1 - positions)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; `>>` alone would fill with the sign."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)


def weighted_keys(values: Tensor, keys: Tensor) -> Tensor:
    """Return keys by which a random sample wins whose chances go with the fourth power of positive activations.

    An entry's key is `log(w / -log u)` with weight w and a uniform u from the hash in `keys` (Efraimidis and Spirakis
    2006). Where most firings are weak, the fourth power spreads a sample about evenly up to the largest.
    """
    uniform = ((keys >> 32).double() + 0.5) / 2**31
    ranks = 4 * values.double().log() - (-uniform.log()).log()
    return value_keys((ranks + _ABOVE_ZERO).clamp(min=1e-3), key_positions(keys))


def key_values(keys: Tensor) -> Tensor:
    """Return the activations in keys of [`value_keys`]."""
    return (keys >> 32).int().view(torch.float32)


def key_positions(keys: Tensor) -> Tensor:
    """Return the positions in keys of either kind."""
    return MOST_POSITIONS - 1 - (keys & (MOST_POSITIONS - 1))


class Best:
    """The K largest keys of each latent, with a payload for each entry.

    Args:
        num_latents (`int`): Number F of latents.
        count (`int`): Number K of entries of a latent.
        payload (`dict[str, tuple[int, torch.dtype]]`, *optional*): Width and type of the payload tensors, by name.
        device (`torch.device`, *optional*): Device of the tensors.

    Attributes:
        keys (`Tensor` of shape `(F, K)`): Keys, int64, in no order; -1 where a place is free.
        payload (`dict[str, Tensor]`): Payload tensors `(F, K, width)`, by name.
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
        """Return the candidates of `(C,)` that may enter: those above the smallest key of a latent that has K."""
        return (keys > self._limit[cols]).nonzero().squeeze(1)

    def take(self, cols: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Give the candidates among the K largest keys a place; [`write`] their payload there afterwards.

        Args:
            cols (`Tensor` of shape `(C,)`): Latent of each candidate.
            keys (`Tensor` of shape `(C,)`): Key of each candidate.

        Returns:
            `tuple[Tensor, Tensor]`: Indices of the candidates that entered, and their places among the K.
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
        """Write the payload of entries, given by latents and places."""
        for name, rows in payload.items():
            self.payload[name][cols, places] = rows.to(self.payload[name].dtype)

    def in_order(self) -> "Best":
        """Return the entries with the largest key first, so that they do not depend on the order of arrival."""
        order = self.keys.argsort(dim=1, descending=True)
        ordered = Best(*self.keys.shape, device=self.keys.device)
        ordered.keys = self.keys.gather(1, order)
        ordered._limit = self._limit
        ordered.payload = {
            name: rows.gather(1, order[..., None].expand_as(rows)) for name, rows in self.payload.items()
        }
        return ordered

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"keys": self.keys, **self.payload}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state into these tensors."""
        self.keys.copy_(state["keys"])
        self._limit = self.keys.amin(1)
        for name, rows in self.payload.items():
            rows.copy_(state[name])

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the entries of another process."""
        device = self.keys.device
        cols, places = (state["keys"] >= 0).nonzero(as_tuple=True)
        if not len(cols):
            return
        chosen, place = self.take(cols.to(device), state["keys"][cols, places].to(device))
        cols, places = cols[chosen.cpu()], places[chosen.cpu()]
        self.write(cols.to(device), place, **{name: state[name][cols, places].to(device) for name in self.payload})
