"""Contexts of each latent: those in which it fires most, and random ones for quantiles and bands of activation.

The quantiles need a sample in which all firings are alike; for the bands there is one in which strong firings are
likelier, so that each band between 0 and the largest activation has some.

A context is a run of tokens around one at which the latent fires, cut from the window the language model saw, with
the latent's activations on them. Each window gives a latent at most one context of either kind.

Shapes: B windows, S tokens in a window, W tokens in a context, F latents, M pairs, C candidates.
"""

from typing import Any

import torch
from torch import Tensor

from ..firings import Firings
from .best import Best, random_keys, value_keys, weighted_keys


class Parts:
    """Sums over tokens in several parts, saved and merged as one; tensors are named `<part>.<name>`.

    Attributes:
        parts (`dict[str, Any]`): The parts by name. A part without `merge` adds up over processes by itself.
    """

    parts: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of all parts by name."""
        parts = self.parts.items()
        return {f"{part}.{name}": tensor for part, sums in parts for name, tensor in sums.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state into the parts."""
        for part, sums in self.parts.items():
            sums.load_state_dict(_of_part(state, part))

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the sums of another process."""
        for part, sums in self.parts.items():
            if hasattr(sums, "merge"):
                sums.merge(_of_part(state, part))


def _of_part(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


class Contexts(Parts):
    """The contexts of each latent.

    Args:
        num_latents (`int`): Number F of latents.
        top (`int`): Number of contexts in which a latent fires most.
        sample (`int`): Number of random contexts of a latent.
        spread (`int`): Number of random contexts that are chosen in proportion to a power of the activation.
        width (`int`): Number W of tokens in a context.
        seed (`int`): Seed of the sample.
        device (`torch.device`, *optional*): Device of the tensors.
    """

    def __init__(
        self,
        num_latents: int,
        top: int,
        sample: int,
        spread: int,
        width: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        payload = {
            "token_ids": (width, torch.int32),
            "activations": (width, torch.float32),
            "peak": (1, torch.int16),
        }
        self.top = Best(num_latents, top, payload, device)
        self.sample = Best(num_latents, sample, payload, device)
        self.spread = Best(num_latents, spread, payload, device)
        self.parts = {"top": self.top, "sample": self.sample} | ({"spread": self.spread} if spread else {})
        self.width, self.seed = width, seed

    def add(self, firings: Firings) -> None:
        """Add windows; none may come twice."""
        positions = firings.positions
        keys = value_keys(firings.values, positions[firings.rows])
        self._keep(self.top, firings, self.top.passing(firings.cols, keys), keys)
        hashes = random_keys(positions, self.seed)
        keys = hashes[firings.rows]
        self._keep(self.sample, firings, self.sample.passing(firings.cols, keys), keys)
        if "spread" in self.parts:
            keys = weighted_keys(firings.values, hashes[firings.rows])
            self._keep(self.spread, firings, self.spread.passing(firings.cols, keys), keys)

    def _keep(self, best: Best, firings: Firings, candidates: Tensor, keys: Tensor) -> None:
        candidates = self._one_per_window(firings, candidates, keys)
        if not len(candidates):
            return
        cols = firings.cols[candidates]
        accepted, places = best.take(cols, keys[candidates])
        chosen = candidates[accepted]
        best.write(cols[accepted], places, **self._cut_out(firings, chosen))

    @staticmethod
    def _one_per_window(firings: Firings, candidates: Tensor, keys: Tensor) -> Tensor:
        """Return the candidate with the largest key of each latent and window."""
        order = candidates[keys[candidates].argsort(descending=True)]
        bags = _bags(firings, order)
        by_bag = bags.argsort(stable=True)
        bags = bags[by_bag]
        begins = torch.ones_like(bags, dtype=torch.bool)
        begins[1:] = bags[1:] != bags[:-1]
        return order[by_bag[begins]]

    def _cut_out(self, firings: Firings, chosen: Tensor) -> dict[str, Tensor]:
        """Return tokens and activations around the chosen pairs `(C,)`, no two of one latent and window."""
        ids, width = firings.input_ids, self.width
        length, num_latents = ids.shape[1], len(self.top.keys)
        token = firings.places[chosen]
        window, place = token // length, token % length
        start = (place - _before(width)).clamp(0, length - width)
        # Number of the context to which every other pair of the same latent and window belongs.
        number = torch.full((len(ids) * num_latents,), -1, dtype=torch.int32, device=ids.device)
        number[_bags(firings, chosen, num_latents)] = torch.arange(len(chosen), dtype=torch.int32, device=ids.device)
        of_pair = number[_bags(firings, slice(None), num_latents)]
        pairs = (of_pair >= 0).nonzero().squeeze(1)
        context = of_pair[pairs].long()
        offset = firings.places[pairs] % length - start[context]
        inside = ((offset >= 0) & (offset < width)).nonzero().squeeze(1)
        activations = torch.zeros(len(chosen), width, device=ids.device)
        activations[context[inside], offset[inside]] = firings.values[pairs[inside]].float()
        columns = start[:, None] + torch.arange(width, device=ids.device)
        return {
            "token_ids": ids[window[:, None], columns],
            "activations": activations,
            "peak": (place - start)[:, None],
        }


def _before(width: int) -> int:
    """Return the number of tokens before the peak: two thirds, as they explain a firing better than later ones."""
    return width * 2 // 3


def _bags(firings: Firings, pairs: Tensor | slice, num_latents: int | None = None) -> Tensor:
    """Return for each of some pairs a number that stands for its latent and window."""
    cols = firings.cols[pairs]
    factor = num_latents or (int(cols.max()) + 1 if len(cols) else 1)
    return firings.places[pairs] // firings.input_ids.shape[1] * factor + cols
