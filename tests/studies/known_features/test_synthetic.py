"""The synthetic world: frequencies, trees, magnitudes, correlations, directions; what it refuses."""

import pytest
import torch

from hf_matryoshka_sae.models import TopKSAEConfig, build_sae
from hf_matryoshka_sae.studies.known_features.synthetic import SyntheticModel, World
from hf_matryoshka_sae.studies.known_features.training import toy_spec
from hf_matryoshka_sae.training.sae.initialization import initialize


def draw(model: SyntheticModel, samples: int, seed: int = 7):
    return model.sample(samples, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"exclusive": False}, {"correlation": 0.5, "rank": 3}])
def test_features_are_on_as_often_as_the_law_says(options):
    world = World(features=64, d_in=16, trees=4, p_min=0.01, **options)
    model, samples = SyntheticModel(world), 60_000
    law = [i**-0.5 for i in range(1, 65)]
    expected = torch.tensor([0.01 + 0.39 * (share - law[-1]) / (1 - law[-1]) for share in law])
    assert expected[0] == pytest.approx(0.4) and expected[-1] == pytest.approx(0.01)
    features, _ = draw(model, samples)
    found = (features > 0).float().mean(0)
    error = (expected * (1 - expected) / samples).sqrt()
    assert ((found - expected).abs() < 4.5 * error).all()
    assert model.expected_l0 == pytest.approx(expected.sum().item(), rel=1e-5)
    assert (features > 0).sum(1).float().mean().item() == pytest.approx(model.expected_l0, rel=0.02)


def test_children_are_on_only_where_their_parent_is_and_siblings_never_together():
    model = SyntheticModel(World(features=128, d_in=16, trees=3, p_min=1e-3))
    on = draw(model, 40_000)[0] > 0
    below = [i for i, parent in enumerate(model.parents) if parent >= 0]
    assert len(below) == 3 * (4 + 16)
    for child in below:
        assert not (on[:, child] & ~on[:, model.parents[child]]).any()
    for parent in {model.parents[child] for child in below}:
        children = model.children(parent)
        assert on[:, children].sum(1).max() == 1
        assert model.probabilities[children].sum() <= 0.8 * model.probabilities[parent] + 1e-9
    free = SyntheticModel(World(features=128, d_in=16, trees=3, p_min=1e-3, exclusive=False))
    assert max((draw(free, 40_000)[0][:, free.children(p)] > 0).sum(1).max() for p in range(3)) > 1


def test_hidden_states_are_sums_of_directions():
    world = World(features=40, d_in=24, trees=2, noise=0.0, bias=2.0)
    model = SyntheticModel(world, 3)
    features, x = draw(model, 500)
    assert torch.allclose(x, features @ model.directions + model.bias, atol=1e-5)
    assert torch.allclose(model.directions.norm(dim=1), torch.ones(40), atol=1e-5)
    assert model.bias.norm().item() == pytest.approx(2)
    values = features[features > 0]
    assert values.mean().item() == pytest.approx(1, abs=0.02) and values.std().item() == pytest.approx(0.25, abs=0.02)
    noisy = SyntheticModel(World(features=40, d_in=24, trees=2, noise=0.5), 3)
    features, x = draw(noisy, 4000)
    noise = x - features @ noisy.directions - noisy.bias
    assert noise.square().sum(1).mean().sqrt().item() == pytest.approx(0.5, rel=0.02)


def test_few_directions_are_orthogonal():
    model = SyntheticModel(World(features=16, d_in=24, trees=0))
    assert torch.allclose(model.directions @ model.directions.T, torch.eye(16), atol=1e-5)


def test_correlated_features_are_on_together_more_than_others():
    world = World(features=30, d_in=30, trees=0, p_min=0.2, correlation=0.9, rank=1)
    correlated, single = (
        torch.corrcoef((draw(SyntheticModel(of), 20_000)[0] > 0).float().T).fill_diagonal_(0).abs().mean()
        for of in (world, World(features=30, d_in=30, trees=0, p_min=0.2))
    )
    assert correlated > 0.4 and single < 0.02


def test_a_seed_gives_one_world_and_one_stream():
    world = World(features=32, d_in=16, trees=2)
    first, again, other = SyntheticModel(world, 1), SyntheticModel(world, 1), SyntheticModel(world, 2)
    assert first.directions.equal(again.directions) and not first.directions.equal(other.directions)
    a, b = (next(model.batches(10, 5)) for model in (first, again))
    assert a.equal(b) and a.shape == (10, 16)
    assert not a.equal(next(first.batches(10, 6)))


def test_an_sae_of_the_same_seed_does_not_start_from_the_truth():
    model = SyntheticModel(World(features=64, d_in=32, trees=2), 0)
    sae = build_sae(TopKSAEConfig(d_in=32, num_latents=64, k=4))
    initialize(sae, toy_spec("vanilla", 64), torch.randn(10, 32), torch.zeros(32), 0)
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    assert (rows * model.directions).sum(1).mean().abs() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "`features` must be at least 1, got 0"),
        ({"trees": 600}, "`trees` must lie between 0 and `features` \\(512\\), got 600"),
        ({"p_min": 0.5}, "0 < `p_min` <= `p_max` < 1, got 0.5 and 0.4"),
        ({"correlation": 1.0}, "`correlation` must lie between 0 and below 1"),
        ({"noise": -1.0}, "`noise` must be at least 0"),
        ({"exponent": 0.0}, "`exponent` must be above 0"),
    ],
)
def test_a_world_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        World(**options)
