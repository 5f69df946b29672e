"""Matching against SAEs whose weights are written down."""

from itertools import permutations

import pytest
import torch

from hf_matryoshka_sae.models import ReluSAEConfig, build_sae
from hf_matryoshka_sae.studies.known_features.matching import assign, match
from hf_matryoshka_sae.studies.known_features.model import ToyModel
from hf_matryoshka_sae.studies.known_features.tree import FeatureTree, Node, load_tree


PARENTS = {0: [1, 2, 3], 4: [5, 6, 7], 8: [9, 10, 11]}


@pytest.fixture
def model():
    return ToyModel(load_tree(), seed=1)


def sae_of(W_enc, W_dec):
    sae = build_sae(ReluSAEConfig(d_in=W_dec.shape[1], num_latents=len(W_dec), apply_b_dec_to_input=False)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
    return sae


def readers(model):
    """Rows whose product with a hidden state is 1 where their feature is on and 0 elsewhere."""
    return model.directions / model.directions.square().sum(1, keepdim=True)


def test_directions_are_orthogonal_with_norms_near_one():
    directions = ToyModel(load_tree(), seed=0).directions
    gram = directions @ directions.T
    norms = gram.diagonal().sqrt()
    assert torch.allclose(gram - gram.diagonal().diag(), torch.zeros(20, 20), atol=1e-5)
    assert 0.02 < norms.std() < 0.1
    assert norms.mean() == pytest.approx(1, abs=0.05)
    assert not torch.equal(directions, ToyModel(load_tree(), seed=1).directions)


def test_hidden_states_are_sums_of_directions(model):
    features, x = model.sample(50)
    expected = torch.stack([model.directions[row > 0].sum(0) for row in features])
    assert torch.allclose(x, expected, atol=1e-6)


def test_batches_are_samples_in_a_row(model):
    stream = model.batches(200, seed=5)
    joined = torch.cat([next(stream) for _ in range(250)])
    assert torch.equal(joined, model.sample(50_000, torch.Generator().manual_seed(5))[1])
    assert not torch.equal(next(stream), joined[:200])


def test_a_perfect_dictionary_in_another_order(model):
    order = torch.randperm(20)
    found = match(model, sae_of(readers(model)[order], model.directions[order]))
    assert found.latents == order.argsort().tolist()
    assert found.mcc == pytest.approx(1, abs=1e-3)
    assert found.mean_max_cosine == pytest.approx(1, abs=1e-5)
    assert found.recall == [1.0] * 20
    assert list(found.parent_fires) == list(PARENTS)
    assert found.parents_fire == 1
    assert found.l0 >= 1.1  # float rounding lets a latent fire at 1e-8
    assert found.fvu < 1e-6
    assert torch.allclose(found.cosine, torch.eye(20), atol=1e-5)
    assert torch.allclose(found.similarity, found.together, atol=1e-3)


def absorbing(model):
    """Parents fall silent where a child is on; the child's latent writes both."""
    W_enc, W_dec = readers(model), model.directions.clone()
    for parent, children in PARENTS.items():
        W_enc[parent] -= W_enc[children].sum(0)
        W_dec[children] += W_dec[parent]
    sae = sae_of(W_enc, W_dec)
    with torch.no_grad():
        sae.b_enc.fill_(-0.01)
    return sae


def test_an_absorbing_dictionary(model):
    found = match(model, absorbing(model))
    assert found.latents == list(range(20))
    assert found.parents_fire == 0
    assert found.l0 == pytest.approx(0.85, abs=0.02)  # 3 * 0.15 + 8 * 0.05: one latent for parent and child
    assert found.precision == [1.0] * 20
    for i in range(20):
        assert found.recall[i] == (pytest.approx(0.4, abs=0.02) if i in PARENTS else 1)
    assert [i for i, recovered in enumerate(found.recovered) if recovered] == list(range(12, 20))
    # The exact correlation of a parent with "parent, no child".
    p, q = 0.15, 0.06
    expected = q * (1 - p) / (p * (1 - p) * q * (1 - q)) ** 0.5
    assert found.correlation[0] == pytest.approx(expected, abs=0.02)
    assert found.mcc == pytest.approx((17 + 3 * expected) / 20, abs=0.01)


def test_spare_and_dead_latents(model):
    """More latents than features, some of which never fire."""
    nothing = torch.zeros(3, 20)
    found = match(model, sae_of(torch.cat([nothing, readers(model)]), torch.cat([nothing, model.directions])))
    assert found.latents == list(range(3, 23))
    assert found.cosine.shape == found.similarity.shape == (20, 23)
    assert found.similarity.isfinite().all() and found.cosine.isfinite().all()
    silent = match(model, sae_of(torch.zeros(20, 20), model.directions))
    assert silent.mcc == 0
    assert silent.recall == silent.precision == [0.0] * 20


def test_the_assignment_is_the_best_of_all():
    features, latents = torch.rand(30, 5) * (torch.rand(30, 5) < 0.3), torch.rand(30, 6) * torch.arange(1.0, 7)
    similarity = (features / features.amax(0)).T @ (latents / latents.amax(0))
    best = max(permutations(range(6), 5), key=lambda order: sum(similarity[i, j] for i, j in enumerate(order)))
    assert assign(features, latents) == list(best)


def test_a_tree_without_parents_has_no_hole():
    model = ToyModel(FeatureTree(Node(1.0, is_read_out=False, children=[Node(0.3), Node(0.2)])))
    found = match(model, sae_of(readers(model), model.directions))
    assert found.parent_fires == {}
    assert found.parents_fire is None


def test_what_does_not_fit_is_said(model):
    with pytest.raises(ValueError, match="width 20, the SAE takes 7"):
        match(model, sae_of(torch.zeros(20, 7), torch.zeros(20, 7)))
    with pytest.raises(ValueError, match="20 features need as many latents, got 19"):
        match(model, sae_of(torch.zeros(19, 20), torch.zeros(19, 20)))
