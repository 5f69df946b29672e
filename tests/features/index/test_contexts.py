import pytest
import torch

from hf_matryoshka_sae.features.index.best import Best, key_positions, key_values, random_keys, value_keys

from .. import small


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("index"))


def _expected_tops(values, latent, count):
    """Window, position and value of the strongest token of the strongest windows; of equal ones the earlier."""
    peaks, places = values[..., latent].max(1)
    order = peaks.sort(descending=True, stable=True).indices[:count]
    return [(int(w), int(places[w]), float(peaks[w])) for w in order if peaks[w] > 0]


def test_top_contexts_equal_sorting_everything(built):
    ids, values, _ = small.dense()
    for latent in range(small.LATENTS):
        found = built.feature(latent).top_contexts
        expected = _expected_tops(values, latent, small.SIZES.top_contexts)
        assert [(context.window, context.position) for context in found] == [each[:2] for each in expected]
        for context, (window, position, value) in zip(found, expected, strict=True):
            start = position - context.peak
            shown = slice(start, start + small.SIZES.context_tokens)
            assert 0 <= start <= small.LENGTH - small.SIZES.context_tokens
            assert context.value == pytest.approx(value) and context.activations[context.peak] == context.value
            assert context.token_ids.tolist() == ids[window, shown].tolist()
            torch.testing.assert_close(torch.tensor(context.activations), values[window, shown, latent])


def test_quantile_contexts_are_where_the_latent_fires_as_strongly(built):
    ids, values, _ = small.dense()
    filled = 0
    for latent in range(small.LATENTS):
        feature = built.feature(latent)
        last = 0.0
        for quantile, contexts in feature.quantile_contexts.items():
            assert 0 <= quantile < small.SIZES.quantiles and len(contexts) <= small.SIZES.quantile_contexts
            strengths = [context.value for context in contexts]
            assert min(strengths) >= last  # every quantile is stronger than the one before
            last = max(strengths)
            for context in contexts:
                filled += 1
                assert context.value == pytest.approx(float(values[context.window, context.position, latent]))
                start = context.position - context.peak
                shown = slice(start, start + small.SIZES.context_tokens)
                assert context.token_ids.tolist() == ids[context.window, shown].tolist()
                torch.testing.assert_close(torch.tensor(context.activations), values[context.window, shown, latent])
        windows = [context.window for each in feature.quantile_contexts.values() for context in each]
        assert len(set(windows)) == len(windows)
    assert filled > small.LATENTS


def test_the_seed_draws_the_sample_and_not_the_top(built, tmp_path):
    other = small.build(tmp_path, seed=1)
    mine, theirs = built.feature(3), other.feature(3)
    assert [c.window for c in mine.top_contexts] == [c.window for c in theirs.top_contexts]
    of = [[c.window for each in feature.quantile_contexts.values() for c in each] for feature in (mine, theirs)]
    assert of[0] != of[1]


def test_contexts_are_no_longer_than_windows(tmp_path):
    sizes = small.IndexSizes(top_contexts=2, context_tokens=99)
    context = small.build(tmp_path, sizes=sizes).feature(0).top_contexts[0]
    assert len(context.token_ids) == small.LENGTH and context.peak == context.position


# The keeping of the best


def test_keys_are_ordered_and_hold_what_they_were_made_of():
    values = torch.tensor([1e-30, 0.5, 0.5, 3.0, 1e30])
    positions = torch.tensor([7, 2**32 - 1, 3, 0, 11])
    keys = value_keys(values, positions)
    assert keys.argsort().tolist() == [0, 1, 2, 3, 4]  # of equal values the earlier position wins
    assert torch.equal(key_values(keys), values) and torch.equal(key_positions(keys), positions)
    sample = random_keys(torch.arange(10_000), seed=5)
    assert (sample >= 0).all() and torch.equal(key_positions(sample), torch.arange(10_000))
    assert abs((sample >> 32).double().mean() / 2**31 - 0.5) < 0.02
    assert not torch.equal(sample, random_keys(torch.arange(10_000), seed=6))


@pytest.mark.parametrize("splits", [1, 3, 50])
def test_the_best_are_kept_however_they_come(splits):
    latents, count = 9, 4
    cols = torch.randint(latents, (300,)) % 8  # one latent gets nothing
    keys = torch.randperm(10_000)[:300]
    best = Best(latents, count, {"twice": (1, torch.int64)})
    for part in torch.arange(300).tensor_split(splits):
        some = part[best.passing(cols[part], keys[part])]
        if len(some):
            taken, places = best.take(cols[some], keys[some])
            best.write(cols[some][taken], places, twice=2 * keys[some][taken][:, None])
    other = Best(latents, count, {"twice": (1, torch.int64)})
    other.merge(best.state_dict())
    for found in (best.in_order(), other.in_order()):
        for latent in range(latents):
            expected = keys[cols == latent].sort(descending=True).values[:count].tolist()
            assert found.keys[latent].tolist() == expected + [-1] * (count - len(expected))
        there = found.keys >= 0
        assert torch.equal(found.payload["twice"][there].squeeze(-1), 2 * found.keys[there])
