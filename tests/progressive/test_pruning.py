import logging

import pytest
import torch

from hf_matryoshka_sae.progressive import pruning
from hf_matryoshka_sae.progressive.merging import merge_latents
from hf_matryoshka_sae.progressive.pruning import prune
from hf_matryoshka_sae.progressive.ranking import rank_latents, sort_latents
from hf_matryoshka_sae.progressive.refit import refit
from hf_matryoshka_sae.progressive.statistics import latent_statistics

from ..axes import each
from ..models.reference import OPTIONS, VARIANTS, F, assert_close, dense_forward, hidden_states, make_sae


def _same(left, right):
    assert type(left) is type(right) and left.config.to_dict() == right.config.to_dict()
    assert left.state_dict().keys() == right.state_dict().keys()
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name]), name


@each(options=OPTIONS, variant=list(VARIANTS))
def test_pruning_to_full_width_is_exact(variant, options):
    sae, x = make_sae(variant, **options), hidden_states(40)
    pruned = prune(sae, F, activations=[x])
    assert_close(pruned(x).reconstruction, dense_forward(sae, x)[1][-1])
    assert sorted(pruned.latent_ids.tolist()) == list(range(F))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pruning_is_sorting_and_truncating(variant):
    sae, x = make_sae(variant), hidden_states(40)
    statistics = latent_statistics(sae, [x])
    _same(prune(sae, 7, "frequency", statistics), sort_latents(sae, "frequency", statistics).truncate(7))


def test_the_kept_latents_are_the_most_important_and_know_their_ids():
    sae, x = make_sae("jumprelu"), hidden_states(60)
    order = rank_latents(sae, "contribution", activations=[x])
    pruned = prune(sae, 5, "contribution", activations=[x])
    assert torch.equal(pruned.latent_ids, order[:5])
    acts = torch.zeros(60, F, dtype=torch.float64)
    acts[:, order[:5]] = pruned.encode(x).to_dense()
    # Where latents do not compete, masking the others is the same.
    full = dense_forward(sae, x)[0].index_fill(1, order[5:], 0)
    assert_close(acts, full.detach())
    assert torch.equal(prune(pruned, 2, order=torch.tensor([4, 3, 2, 1, 0])).latent_ids, order[:5].flip(0)[:2])


def test_topk_latents_compete_for_the_places_that_are_left():
    sae, x = make_sae("topk"), hidden_states(40)
    pruned = prune(sae, 5, activations=[x])
    assert pruned.config.k == 3
    restricted = sort_latents(sae, activations=[x])(x, width=5)
    assert_close(pruned(x).reconstruction, restricted.reconstruction)
    assert prune(sae, 2, activations=[x]).config.k == 2


def test_prefixes_of_a_matryoshka_sae_stay():
    sae, x = make_sae("matryoshka-batch_topk", prefix_weights=[1, 2, 3]), hidden_states(60)
    pruned = prune(sae, 9, activations=[x])
    assert pruned.prefix_widths == [2, 5, 9]
    for width in (2, 5):
        assert_close(pruned(x, width=width).reconstruction, sae(x, width=width).reconstruction)
    outer = [i for i in rank_latents(sae, activations=[x]).tolist() if i >= 5]
    assert pruned.latent_ids[5:].tolist() == outer[:4]
    assert prune(sae, 4, activations=[x]).prefix_widths == [2, 4]


def test_merging_comes_first_and_stops_at_the_width():
    sae, x = make_sae("relu", num_latents=8), hidden_states(80)
    with torch.no_grad():
        sae.W_dec[4:], sae.W_enc[4:], sae.b_enc[4:] = sae.W_dec[:4], sae.W_enc[:4], sae.b_enc[:4]  # four twins
    whole = sae(x).reconstruction
    statistics = latent_statistics(sae, [x])
    for options in ({"activations": [x]}, {"statistics": statistics}, {"by": "trained"}):
        pruned = prune(sae, 4, merge=0.99, **options)
        assert_close(pruned(x).reconstruction, whole)
    assert prune(sae, 6, merge=0.99, statistics=statistics).config.num_latents == 6
    assert_close(prune(sae, 6, merge=0.99, statistics=statistics)(x).reconstruction, whole)
    merged = merge_latents(sae, 0.99, statistics)
    _same(prune(sae, 3, merge=0.99, activations=[x]), prune(merged.sae, 3, activations=[x]))


def test_refitting_is_done_to_what_is_left_and_logged(caplog):
    sae, batches = make_sae("jumprelu"), list(hidden_states(80).split(10))
    with caplog.at_level(logging.INFO, logger=pruning.__name__):
        refitted = prune(sae, 6, activations=batches, refit=True)
    result = refit(prune(sae, 6, activations=batches), batches)
    _same(refitted, result.sae)
    assert f"FVU {result.fvu_before:.4f} -> {result.fvu_after:.4f} on 20 held-out tokens" in caplog.text


def test_the_sae_is_not_changed():
    sae, x = make_sae("matryoshka-topk"), hidden_states(40)
    config, before = sae.config.to_dict(), {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    prune(sae, 4, activations=[x], merge=0.1, refit=True)
    assert sae.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_errors_come_before_any_work():
    sae, x = make_sae("relu"), hidden_states(10)
    for width in (0, F + 1):
        with pytest.raises(ValueError, match="`width` must lie between 1 and"):
            prune(sae, width, activations=[x])
    with pytest.raises(ValueError, match="`merge` or an `order`"):
        prune(sae, 3, order=torch.arange(F), merge=0.9)
    with pytest.raises(ValueError, match="Refitting needs `activations`"):
        prune(sae, 3, "trained", refit=True)
    with pytest.raises(ValueError, match="needs `statistics` of the SAE or `activations`"):
        prune(sae, 3)
    for options in ({"refit": True}, {"merge": 0.9}):
        with pytest.raises(ValueError, match="more than once: pass a list"):
            prune(sae, 3, activations=iter([x]), **options)
    assert prune(sae, 3, activations=iter([x])).config.num_latents == 3
    assert prune(sae, 3, "trained", activations=iter([x]), refit=True).config.num_latents == 3
