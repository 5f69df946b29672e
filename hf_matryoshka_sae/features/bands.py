"""Whether a latent's firings are about its own tokens, in bands of activation: often strong ones are, weak ones not.

A latent's own tokens are those under its strongest firings in windows of even number. In windows of odd number, the
precision of a band is the share of its firings on own tokens. A random latent, which fires as often and anywhere, has
the share of own tokens in the text, whatever the band.

Precision is estimated from the strongest firings of each latent, all of which are known down to a value, and from a
random sample of those below it.

Shapes: F latents, M pairs, n entries of a latent, V vocabulary, B bands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .firings import Firings
from .index.best import Best, key_values, random_keys, value_keys
from .index.contexts import Parts


EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the bands, as fractions of a latent's largest activation."""

_OWN, _STRONGEST, _RANDOM = 32, 32, 128  # firings that are kept of a latent
_SHOWN_TOKENS = 8
_LATENTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Band:
    """A latent's firings between two activations.

    Args:
        low (`float`), high (`float`): Bounds, as fractions of its largest activation.
        firings (`int`): Number of firings, from the histogram of activations.
        precision (`float`, *optional*): Share of them on the latent's own tokens; `None` where none was looked at.
        base (`float`): Share that a random latent would have.
    """

    low: float
    high: float
    firings: int
    precision: float | None
    base: float


def band_of(values: Tensor, largest: Tensor) -> Tensor:
    """Return the number of the band of each activation; `largest` is the latent's largest, of a shape that fits."""
    shares = values / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.bucketize(shares, torch.tensor(EDGES[1:-1], device=values.device), right=True)


class TokenCounts:
    """How often each token is in a text."""

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, tokens: Tensor) -> None:
        """Add tokens `(N,)`."""
        self.merge({"counts": torch.bincount(tokens).cpu()})

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the counts of another process."""
        size = max(len(self.counts), len(state["counts"]))
        both = [torch.nn.functional.pad(counts, (0, size - len(counts))) for counts in (self.counts, state["counts"])]
        self.counts = both[0] + both[1]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the counts of a state."""
        self.counts = state["counts"]


class BandSample(Parts):
    """Each latent's strongest firings in either half of the text, and a random sample of those in the second.

    Args:
        num_latents (`int`): Number F of latents.
        seed (`int`): Seed of the sample.
        device (`torch.device`, *optional*): Device of the tensors.
    """

    def __init__(self, num_latents: int, seed: int, device: torch.device | str = "cpu") -> None:
        token = {"token": (1, torch.int32)}
        self.own = Best(num_latents, _OWN, token, device)
        self.strongest = Best(num_latents, _STRONGEST, token, device)
        self.random = Best(num_latents, _RANDOM, token | {"value": (1, torch.float32)}, device)
        self.text, self.seed = TokenCounts(), seed
        self.parts = {"own": self.own, "strongest": self.strongest, "random": self.random, "text": self.text}

    def add(self, firings: Firings, counted: Tensor) -> None:
        """Add windows, none twice; `counted` says which of the N tokens count, as some are looked at besides."""
        ids, length = firings.input_ids.flatten(), firings.input_ids.shape[1]
        second = firings.numbers[firings.tokens // length] % 2 == 1
        self.text.add(ids[firings.tokens[second & counted]])
        tokens, second = ids[firings.places], second[firings.rows]
        positions = firings.positions
        keys = value_keys(firings.values, positions[firings.rows])
        self._keep(self.own, firings, keys, ~second, token=tokens)
        self._keep(self.strongest, firings, keys, second, token=tokens)
        keys = random_keys(positions, self.seed)[firings.rows]
        self._keep(self.random, firings, keys, second, token=tokens, value=firings.values)

    @staticmethod
    def _keep(best: Best, firings: Firings, keys: Tensor, inside: Tensor, **payload: Tensor) -> None:
        candidates = best.passing(firings.cols, keys)
        candidates = candidates[inside[candidates]]
        if len(candidates):
            cols = firings.cols[candidates]
            chosen, places = best.take(cols, keys[candidates])
            pairs = candidates[chosen]
            best.write(cols[chosen], places, **{name: values[pairs, None] for name, values in payload.items()})

    def precision(self, largest: Tensor, firings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the precision of each band, that of a random latent, and the most frequent own tokens.

        Args:
            largest (`Tensor` of shape `(F,)`): Largest activation of each latent.
            firings (`Tensor` of shape `(F, B)`): Number of firings in each band.

        Returns:
            `tuple[Tensor, Tensor, Tensor]`: precision `(F, B)`, NaN where no firing was looked at; base rate `(F,)`;
            own tokens `(F, 8)`, the most frequent first, -1 where there are fewer.
        """
        shares = self.text.counts.double() / self.text.counts.sum().clamp(min=1)
        own = self.own.in_order()  # so that tokens of equal frequency come in the same order
        parts = [
            self._precision(own, slice(start, start + _LATENTS_AT_ONCE), largest, firings, shares.to(largest.device))
            for start in range(0, len(largest), _LATENTS_AT_ONCE)
        ]
        precision, base, tokens = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return precision, base, tokens

    def _precision(
        self, best: Best, rows: slice, largest: Tensor, firings: Tensor, shares: Tensor
    ) -> tuple[Tensor, ...]:
        largest, firings = largest[rows, None], firings[rows]
        own = _tokens(best, rows)
        same = (own[:, :, None] == own[:, None, :]) & (own >= 0)[:, None, :]
        first = (own >= 0) & ~(same.tril(-1).any(2))
        base = (shares[own.clamp(min=0, max=len(shares) - 1)] * (first & (own < len(shares)))).sum(1)
        order = (same.sum(2) * first).argsort(dim=1, descending=True, stable=True)[:, :_SHOWN_TOKENS]
        shown = own.masked_fill(~first, -1).gather(1, order)

        keys = self.strongest.keys[rows]
        values = key_values(keys.clamp(min=0))
        known = torch.where((keys >= 0).all(1), values.amin(1), 0)[:, None]  # all firings down to this are known
        strong = _counts(values, _tokens(self.strongest, rows), keys >= 0, own, largest)
        values = self.random.payload["value"][rows].squeeze(2)
        sampled = (self.random.keys[rows] >= 0) & (values < known)
        weak = _counts(values, _tokens(self.random, rows), sampled, own, largest)
        # Half the firings of a band are in this half of the text; those that are not among the strongest are sampled.
        unknown = (firings.double() / 2 - strong[0]).clamp(min=0) * (weak[0] > 0)
        hits = strong[1] + unknown * weak[1] / weak[0].clamp(min=1)
        return hits / (strong[0] + unknown), base, shown


def _tokens(best: Best, rows: slice) -> Tensor:
    """Return the tokens of the entries `(F, n)`, -1 where a place is free."""
    return best.payload["token"][rows].squeeze(2).long().masked_fill(best.keys[rows] < 0, -1)


def _counts(values: Tensor, tokens: Tensor, inside: Tensor, own: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of entries in each band `(F, B)`, and of those on own tokens."""
    hits = (tokens[:, :, None] == own[:, None, :]).any(2) & inside
    bands = band_of(values, largest)
    members = torch.nn.functional.one_hot(bands, len(EDGES) - 1).double()
    return (members * inside[..., None]).sum(1), (members * hits[..., None]).sum(1)
