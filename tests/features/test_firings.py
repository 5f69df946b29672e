"""Where latents fire, against a loop over every token."""

import numpy as np
import torch

from hf_matryoshka_sae.features.firings import Firings, joined, span, values_of
from hf_matryoshka_sae.models.sparse_ops import pairs_from_slots


LATENTS, LENGTH = 5, 6


def batch(windows: int, first: int, seed: int) -> tuple[Firings, torch.Tensor]:
    """Some windows, of which two in three tokens are looked at, and activations `(B, S, F)`, 0 where they are not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, (windows, LENGTH), generator=generator)
    keep = torch.rand(windows, LENGTH, generator=generator) < 2 / 3
    dense = torch.randn(windows, LENGTH, LATENTS, generator=generator) * keep[..., None]
    rows = dense[keep]
    pairs = pairs_from_slots(rows, torch.arange(LATENTS).expand(rows.shape), LATENTS)  # values below 0 among them
    places = keep.flatten().nonzero().flatten()
    return Firings.of(ids, first, places, pairs, torch.ones(len(pairs.rows), dtype=torch.bool)), dense.clamp(min=0)


def test_joined_batches_say_where_each_latent_fires():
    parts, dense = zip(*(batch(windows, first, first) for windows, first in ((2, 0), (3, 2), (1, 5))), strict=True)
    firings, values = joined(parts), torch.cat(dense).flatten(0, 1)
    assert torch.equal(firings.positions, firings.tokens)  # the windows are numbered from 0, none left out
    found = firings.of_latents([3, 0])
    assert list(found) == [3, 0]
    for latent, (places, activations) in found.items():
        assert places.tolist() == values[:, latent].nonzero().flatten().tolist()
        assert torch.equal(activations, values[places, latent])
    of_tokens = values_of(firings.pairs, torch.tensor([4, 1]))
    assert torch.equal(of_tokens, values[firings.tokens][:, [4, 1]])


def test_a_context_ends_where_something_else_begins():
    inside = np.array([True, False, True, True, True, False, True])
    assert span(inside, 3, 10, 10) == (2, 5)
    assert span(inside, 3, 1, 0) == (2, 4)
    assert span(inside, 5, 10, 10) == (2, 7)  # around a position that is not inside
    assert span(np.ones(7, bool), 3, 10, 10) == (0, 7)
