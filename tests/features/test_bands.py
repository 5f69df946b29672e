"""Bands of activation: against N x F activations, and on latents planted to be about tokens or not."""

import numpy as np
import pytest
import torch

from hf_matryoshka_sae.features import bands as module
from hf_matryoshka_sae.features.bands import EDGES, BandSample
from hf_matryoshka_sae.features.firings import Firings
from hf_matryoshka_sae.features.index.sums import LatentSums
from hf_matryoshka_sae.models.sparse_ops import LatentPairs, PairIndex

from . import small


OWN = 5


def by_hand(ids: torch.Tensor, values: torch.Tensor, latent: int):
    """Precision of each band and base rate of one latent from dense activations `(B, S, F)` of windows 0, 1, ..."""
    acts, second = values[..., latent], torch.arange(len(ids)) % 2 == 1
    even = acts * ~second[:, None]
    strongest = even.flatten().topk(OWN)
    own = set(ids.flatten()[strongest.indices[strongest.values > 0]].tolist())
    hits = torch.tensor([[token in own for token in row] for row in ids.tolist()])
    kept = (values.sum(2) > 0) & second[:, None]  # every kept token of these has latents
    rows = []
    for low, high in zip(EDGES, EDGES[1:], strict=False):
        share = acts / acts.max()
        inside = (acts > 0) & (share >= low) & ((share < high) | (high == 1)) & second[:, None]
        rows.append(float(hits[inside].double().mean()) if inside.any() else None)
    return rows, float(hits[kept].double().mean())


def test_precision_equals_the_dense_reference(tmp_path, monkeypatch):
    for name, count in {"_OWN": OWN, "_STRONGEST": 400, "_RANDOM": 8}.items():
        monkeypatch.setattr(module, name, count)
    index, (ids, values, _) = small.build(tmp_path), small.dense()
    for latent in range(0, small.LATENTS, 3):
        feature = index.feature(latent, contexts=False)
        if not feature.count:
            assert not feature.bands
            continue
        precision, base = by_hand(ids, values, latent)
        assert [band.precision for band in feature.bands] == pytest.approx(precision, abs=1e-6)
        assert feature.bands[0].base == pytest.approx(base, abs=1e-6)
        assert sum(band.firings for band in feature.bands) == feature.count


def planted(windows: int, seed: int = 0) -> tuple[Firings, torch.Tensor]:
    """Latent 0 fires strongly on tokens 0 to 9, and on a third of all tokens weakly; latent 1 fires at random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (windows, 50), generator=generator)
    acts = torch.zeros(windows * 50, 2)
    digit, chance = ids.flatten() < 10, torch.rand(2, windows * 50, generator=generator)
    acts[:, 0] = torch.where(digit, 8 + 2 * chance[0], (chance[1] < 0.3) * (0.5 + chance[0]))
    acts[:, 1] = (chance[1] > 0.9) * (0.1 + 9.9 * chance[0])
    rows, cols = acts.nonzero(as_tuple=True)
    pairs = LatentPairs(PairIndex(rows, cols, *acts.shape), acts[rows, cols])
    places = torch.arange(windows * 50)
    return Firings.of(ids, 0, places, pairs, torch.ones(len(rows), dtype=torch.bool)), acts


def test_a_planted_latent_is_told_from_a_random_one():
    """With the sizes that an index has: the precision of tens of thousands of firings from a few hundred."""
    firings, acts = planted(400)
    sample, sums = BandSample(2, 0), LatentSums(2)
    sample.add(firings, torch.ones(len(firings.tokens), dtype=torch.bool))
    sums.add(firings.cols, firings.values, len(firings.tokens))
    largest = acts.amax(0)
    counts = sums.firings_between(largest[:, None] * torch.tensor(EDGES))
    precision, base, tokens = sample.precision(largest, counts)
    assert set(tokens[0][tokens[0] >= 0].tolist()) <= set(range(10))
    assert precision[0, [0, 4]].tolist() == pytest.approx([0, 1]) and precision[0, 2].isnan()
    assert 0.07 < base[0] < 0.12  # ten of a hundred tokens, or nearly all of them
    assert (precision[1] - base[1]).abs().max() < 0.3 and 0.1 < base[1] < 0.4  # of some 25 firings in each band
    assert float(precision[1].mean()) == pytest.approx(float(base[1]), abs=0.1)


def test_halves_that_are_added_up_give_the_same():
    """What two processes saw, and what was saved in between."""
    firings, acts = planted(60)
    counted = torch.ones(len(firings.tokens), dtype=torch.bool)
    whole, parts = BandSample(2, 0), [BandSample(2, 0), BandSample(2, 0)]
    whole.add(firings, counted)
    for number, part in enumerate(parts):
        chosen = (firings.numbers[firings.places // 50] // 2) % 2 == number
        windows = (firings.numbers[firings.tokens // 50] // 2) % 2 == number
        part.add(
            Firings(firings.input_ids, firings.numbers, firings.tokens, firings.pairs.keep(chosen)), counted & windows
        )
    merged = BandSample(2, 0)
    merged.load_state_dict(parts[1].state_dict())
    merged.merge(parts[0].state_dict())
    largest, counts = acts.amax(0), torch.full((2, 5), 200)
    for one, other in zip(whole.precision(largest, counts), merged.precision(largest, counts), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_firings_between_activations_are_counted_to_a_bin():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(5000, generator=generator) * 3 + 1e-3
    sums = LatentSums(2)
    sums.add(torch.zeros(5000, dtype=torch.int64), values, 5000)
    edges = torch.tensor([[0, 0.6, 1.2, 3.1], [0, 0, 0, 0.0]])
    counts = sums.firings_between(edges)
    exact = torch.histogram(values, edges[0]).hist
    assert counts[0].sum() == 5000 and counts[1].sum() == 0
    torch.testing.assert_close(counts[0].float(), exact, atol=40, rtol=0)


def test_most_bands_have_contexts_where_the_latent_fires_so(tmp_path):
    index, (_, values, _) = small.build(tmp_path), small.dense()
    filled, all_bands = 0, 0
    for latent in range(small.LATENTS):
        feature = index.feature(latent)
        if not feature.count:
            continue
        peaks = values[..., latent].amax(1) / feature.max
        for (low, high), contexts in zip(zip(EDGES, EDGES[1:], strict=False), feature.band_contexts, strict=True):
            assert all(low <= one.value / feature.max < high or high == 1 for one in contexts)
            if ((peaks > 0) & (peaks >= low) & (peaks < high)).sum() > 8:
                filled, all_bands = filled + bool(contexts), all_bands + 1
        places = [(one.window, one.position) for contexts in feature.band_contexts for one in contexts]
        assert len(places) == len(set(places))
    assert all_bands > 30 and filled > 0.9 * all_bands
