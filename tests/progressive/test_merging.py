import pytest
import torch

from hf_matryoshka_sae.progressive.merging import merge_latents
from hf_matryoshka_sae.progressive.statistics import latent_statistics

from ..axes import each
from ..models.reference import OPTIONS, VARIANTS, D, F, assert_close, hidden_states, make_sae


def _twins(variant, **options):
    """Latents 3 and 9 are one, cut in two unequal halves that fire on the same tokens."""
    options |= {"k": F} if "topk" in variant else {}
    sae = make_sae(variant, **options)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name not in ("b_dec", "latent_ids"):
                tensor[9] = tensor[3]
        sae.W_dec[9] *= 0.5
        if sae.config.scale_by_decoder_norm and hasattr(sae, "threshold"):
            sae.threshold[9] *= 0.5  # thresholds of contributions
    return sae


@each(
    with_data={"statistics": True, "data-free": False},
    options=OPTIONS,
    variant=[name for name in VARIANTS if not name.startswith("matryoshka")],
)
def test_latents_that_fire_alike_are_merged_without_loss(variant, options, with_data):
    sae, x = _twins(variant, **options), hidden_states(200)
    before = sae(x).reconstruction
    statistics = latent_statistics(sae, [x]) if with_data else None
    merged = merge_latents(sae, 0.999, statistics)
    assert merged.pairs.tolist() == [[3, 9]] and type(merged.sae) is type(sae)
    assert merged.sae.latent_ids.tolist() == [i for i in range(F) if i != 9]
    assert_close(merged.sae(x).reconstruction, before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_latents_that_never_fire_together_become_one_that_fires_for_both(options):
    sae = make_sae("relu", **options)
    x = hidden_states(400)
    x[:200, 0], x[200:, 0] = 10, -10  # the halves of the data
    with torch.no_grad():
        sae.W_dec[7] = sae.W_dec[2]
        sae.W_enc[[2, 7]] = torch.eye(D, dtype=torch.float64)[1]
        sae.W_enc[2, 0], sae.W_enc[7, 0] = 1, -1  # each fires on one half
        sae.b_enc[[2, 7]] = 0
        sae.b_dec[0] = 0
    statistics = latent_statistics(sae, [x])
    assert statistics.frequency[2] > 0.4 < statistics.frequency[7]
    merged = merge_latents(sae, 0.999, statistics)
    kept, gone = merged.pairs[0].tolist()
    assert {kept, gone} == {2, 7} and len(merged.pairs) == 1
    assert statistics.contribution[kept] >= statistics.contribution[gone]
    share = statistics.contribution[[kept, gone]] / statistics.contribution[[kept, gone]].sum()
    place = merged.sae.latent_ids.tolist().index(kept)
    assert_close(merged.sae.W_enc[place].detach(), (share @ sae.W_enc[[kept, gone]]).detach())
    assert_close(merged.sae.W_dec[place].detach(), sae.W_dec[2].detach())


def test_merging_loses_less_than_dropping():
    """A latent split along its input: two narrower versions with noise, one exclusive of the other or both."""
    sae, x = make_sae("relu", num_latents=40), hidden_states(2000)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.W_enc.copy_(sae.W_dec)
        sae.b_enc.fill_(-0.3)
        for name in ("W_dec", "W_enc"):
            noise = 0.05 * torch.randn(20, D, dtype=torch.float64)
            getattr(sae, name)[20:] = getattr(sae, name)[:20] + noise
        sae.W_dec *= 0.1
    data = sae(x).reconstruction.detach()
    statistics = latent_statistics(sae, [data])
    merged = merge_latents(sae, 0.95, statistics)
    assert len(merged.pairs) >= 15
    kept = torch.tensor([i for i in range(40) if i not in merged.pairs[:, 1]])
    gone = merged.pairs[:, 1]
    target = sae(data).reconstruction
    sae.permute_(torch.cat([kept, gone]))
    dropped = sae.truncate(len(kept))
    errors = [(part(data).reconstruction - target).square().sum().item() for part in (merged.sae, dropped)]
    assert errors[0] < 0.1 * errors[1]


def test_latents_that_overlap_by_chance_are_left_alone():
    sae = make_sae("relu")
    x = hidden_states(300)
    with torch.no_grad():
        sae.W_dec[5] = sae.W_dec[1]
        sae.W_enc[1], sae.W_enc[5] = torch.eye(D, dtype=torch.float64)[:2]
        sae.b_enc[[1, 5]] = -0.5
        sae.b_dec.zero_()
    statistics = latent_statistics(sae, [x])
    both = (statistics.cofiring[1][statistics.neighbours[1] == 5]).item()
    rarer, other = statistics.frequency[[1, 5]].sort().values
    assert 0.2 * rarer < both < 0.45 * other
    assert not len(merge_latents(sae, 0.999, statistics).pairs)
    assert not len(merge_latents(sae, 0.999).pairs)  # their encoders differ


def test_each_latent_is_in_one_pair_and_the_nearest_come_first():
    sae = make_sae("relu")
    with torch.no_grad():
        for i, noise in ((4, 1e-6), (8, 1e-3), (11, 1e-2)):
            sae.W_dec[i] = sae.W_dec[0] + noise * torch.randn(D, dtype=torch.float64)
            sae.W_enc[i], sae.b_enc[i] = sae.W_enc[0], sae.b_enc[0]
    pairs = merge_latents(sae, 0.99).pairs
    assert pairs[0].tolist() == [0, 4] and sorted(pairs.flatten().tolist()) == [0, 4, 8, 11]
    assert len(merge_latents(sae, 0.99, most=1).pairs) == 1 and not len(merge_latents(sae, 0.99, most=0).pairs)


def test_groups_stay_apart_and_prefixes_shrink():
    sae = make_sae("matryoshka-relu", prefix_weights=[1, 2, 3])
    with torch.no_grad():
        for twin, one in ((3, 1), (4, 2), (10, 6), (11, 7)):  # 1 and 3 are of different groups
            sae.W_dec[twin], sae.W_enc[twin], sae.b_enc[twin] = sae.W_dec[one], sae.W_enc[one], sae.b_enc[one]
    x = hidden_states(100)
    merged = merge_latents(sae, 0.999)
    assert sorted(merged.pairs.tolist()) == [[2, 4], [6, 10], [7, 11]]
    assert merged.sae.prefix_widths == [2, 4, 10] and merged.sae.config.prefix_weights == [1, 2, 3]
    for new, old in zip(merged.sae.prefix_widths, sae.prefix_widths, strict=True):
        assert_close(merged.sae(x, width=new).reconstruction, sae(x, width=old).reconstruction)


def test_the_statistics_of_the_merged_dictionary_are_close_to_those_measured():
    sae, x = _twins("relu"), hidden_states(500)
    merged = merge_latents(sae, 0.999, latent_statistics(sae, [x]))
    measured = latent_statistics(merged.sae, [x])
    merged.statistics.check(merged.sae)
    assert_close(merged.statistics.frequency, measured.frequency)
    assert_close(merged.statistics.contribution, measured.contribution)


def test_nothing_to_merge_changes_nothing():
    sae = make_sae("topk")
    merged = merge_latents(sae, 0.9999)
    assert not len(merged.pairs) and merged.statistics is None
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in merged.sae.state_dict().items())


def test_bad_arguments_are_refused():
    sae, x = make_sae("topk"), hidden_states(20)
    for threshold in (0, 1, -0.5, 1.5):
        with pytest.raises(ValueError, match="cosine above 0 and below 1"):
            merge_latents(sae, threshold)
    with pytest.raises(ValueError, match="measured with `neighbours`"):
        merge_latents(sae, 0.9, latent_statistics(sae, [x], neighbours=0))
    with pytest.raises(ValueError, match="13 latents, the SAE has 4"):
        merge_latents(sae.truncate(4), 0.9, latent_statistics(sae, [x]))
