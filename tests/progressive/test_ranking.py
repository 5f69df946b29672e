import pytest
import torch

from hf_matryoshka_sae.evaluation.data import HeldOut
from hf_matryoshka_sae.progressive.greedy import greedy_order
from hf_matryoshka_sae.progressive.ranking import RANKINGS, rank_latents, sort_latents
from hf_matryoshka_sae.progressive.statistics import latent_statistics

from ..axes import each
from ..models.reference import OPTIONS, PREFIXES, VARIANTS, F, assert_close, dense_forward, hidden_states, make_sae


FIELDS = {"energy": "mean_square", "frequency": "frequency", "contribution": "contribution"}


@each(by=list(RANKINGS), options=OPTIONS, variant=list(VARIANTS))
def test_sorting_changes_nothing_at_full_width(variant, options, by):
    sae, x = make_sae(variant, **options), hidden_states(40)
    statistics = latent_statistics(sae, [x])
    statistics.attribution = torch.rand(F, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sorted_sae = sort_latents(sae, by, statistics, [x], across_groups=True)
    assert type(sorted_sae) is type(sae) and sorted_sae.config.to_dict() == sae.config.to_dict()
    assert_close(sorted_sae(x).reconstruction, sae(x).reconstruction)
    assert_close(sorted_sae(x).reconstruction, dense_forward(sae, x)[1][-1])
    ids = sorted_sae.latent_ids
    for name, tensor in sorted_sae.state_dict().items():  # latents moved whole, and the SAE itself did not change
        assert torch.equal(tensor, before[name] if name == "b_dec" else before[name][ids])
        assert torch.equal(sae.state_dict()[name], before[name])


@pytest.mark.parametrize("by", FIELDS)
def test_rankings_by_a_statistic(by):
    sae, x = make_sae("relu"), hidden_states(100)
    statistics = latent_statistics(sae, [x])
    order = rank_latents(sae, by, statistics)
    values = getattr(statistics, FIELDS[by])
    assert order.tolist() == sorted(range(F), key=lambda i: (-values[i], i))
    assert torch.equal(order, rank_latents(sae, by, activations=[x]))
    assert not torch.equal(order, torch.arange(F))


def test_energy_and_contribution_differ_where_rows_have_lengths():
    sae, x = make_sae("relu"), hidden_states(200)
    statistics = latent_statistics(sae, [x])
    assert not torch.equal(rank_latents(sae, "energy", statistics), rank_latents(sae, "contribution", statistics))
    sae.fold_decoder_norm_()
    statistics = latent_statistics(sae, [x])
    assert torch.equal(rank_latents(sae, "energy", statistics), rank_latents(sae, "contribution", statistics))


def test_leave_one_out_ranks_by_what_each_latent_saves():
    sae, x = make_sae("jumprelu"), hidden_states(100)
    acts, prefixes, _ = dense_forward(sae, x)
    without = [prefixes[-1] - acts[:, i : i + 1] * sae.W_dec[i] for i in range(F)]
    growth = torch.stack([(x - y).square().sum(1).mean() for y in without])
    assert torch.equal(rank_latents(sae, "leave_one_out", activations=[x]), growth.argsort(descending=True))


def test_decoder_spectrum_is_the_quadratic_form_of_the_covariance():
    sae = make_sae("topk")
    rows = sae.W_dec.detach()
    expected = torch.einsum("fd,de,fe->f", rows, torch.cov(rows.T, correction=0), rows)
    assert torch.equal(rank_latents(sae, "decoder-spectrum"), expected.argsort(descending=True))


def test_greedy_is_the_greedy_order():
    sae, x = make_sae("topk"), hidden_states(60)
    assert torch.equal(rank_latents(sae, "greedy", activations=[x]), greedy_order(sae, [x]).order)


def test_ties_keep_their_order():
    sae = make_sae("relu", num_latents=2000)
    statistics = latent_statistics(sae, [hidden_states(3)], neighbours=0)
    statistics.frequency = torch.tensor([0.5, 0.0] * 1000)
    assert rank_latents(sae, "frequency", statistics).tolist() == [*range(0, 2000, 2), *range(1, 2000, 2)]
    assert torch.equal(rank_latents(sae, "trained"), torch.arange(2000))


def test_random_is_a_permutation_that_the_seed_decides():
    sae = make_sae("relu")
    state = torch.get_rng_state()
    first, again, other = (rank_latents(sae, "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort().values, torch.arange(F)) and torch.equal(torch.get_rng_state(), state)


# Groups


@pytest.mark.parametrize("by", ["energy", "greedy", "random", "decoder-spectrum"])
def test_a_matryoshka_sae_keeps_its_groups(by):
    sae, x = make_sae("matryoshka-relu"), hidden_states(50)
    inner = sort_latents(sae, by, activations=[x])
    groups = torch.bucketize(inner.latent_ids, torch.tensor(PREFIXES), right=True)
    assert torch.equal(groups, groups.sort().values) and not torch.equal(inner.latent_ids, torch.arange(F))
    for width in PREFIXES:
        assert_close(inner(x, width=width).reconstruction, sae(x, width=width).reconstruction)
    if by != "greedy":
        rank = rank_latents(sae, by, activations=[x]).argsort()
        for low, high in zip((0, *PREFIXES), PREFIXES, strict=False):
            assert (rank[inner.latent_ids[low:high]].diff() > 0).all()
    across = sort_latents(sae, by, activations=[x], across_groups=True)
    assert torch.equal(across.latent_ids, rank_latents(sae, by, activations=[x]))


def test_an_order_of_ones_own_is_taken_within_groups():
    order = torch.arange(F).flip(0)
    assert torch.equal(sort_latents(make_sae("topk"), order=order).latent_ids, order)
    inner = sort_latents(make_sae("matryoshka-topk"), order=order).latent_ids
    assert inner.tolist() == [1, 0, 4, 3, 2, *range(12, 4, -1)]


# Errors


def test_what_is_missing_is_said():
    sae, x = make_sae("topk"), hidden_states(10)
    statistics = latent_statistics(sae, [x])
    with pytest.raises(ValueError, match="Unknown ranking 'energi'. Did you mean 'energy'"):
        rank_latents(sae, "energi")
    with pytest.raises(ValueError, match="'frequency' needs `statistics` of the SAE or `activations`"):
        rank_latents(sae, "frequency")
    with pytest.raises(ValueError, match="'greedy' needs `activations`"):
        rank_latents(sae, "greedy", statistics)
    with pytest.raises(ValueError, match="hold no attribution"):
        rank_latents(sae, "attribution", statistics)
    with pytest.raises(ValueError, match="pass a `HeldOut`"):
        rank_latents(sae, "attribution", activations=[x])
    with pytest.raises(ValueError, match="another order"):
        rank_latents(sort_latents(sae, order=torch.randperm(F)), "energy", statistics)
    with pytest.raises(ValueError, match="all 13 latents once, got 3"):
        sort_latents(sae, order=torch.arange(3))
    with pytest.raises(ValueError, match="12 repeats"):
        sort_latents(sae, order=torch.zeros(F, dtype=torch.long))


def test_attribution_is_measured_on_held_out_tokens():
    from .test_statistics import _heldout

    data = _heldout()
    assert isinstance(data, HeldOut)
    sae = make_sae("topk", torch.float32, d_in=16)
    expected = latent_statistics(sae, data, attribution=True).attribution.argsort(descending=True, stable=True)
    assert torch.equal(rank_latents(sae, "attribution", activations=data), expected)
