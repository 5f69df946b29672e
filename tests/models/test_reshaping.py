"""Dictionaries reordered and folded in place: what comes out is the same SAE."""

import pytest
import torch

from ..axes import each
from .reference import OPTIONS, VARIANTS, D, F, assert_close, hidden_states, make_sae


N = 7
variants = pytest.mark.parametrize("variant", VARIANTS)
# Reordering


@variants
def test_a_permutation_moves_every_tensor_and_leaves_the_reconstruction(variant):
    sae, x, order = make_sae(variant), hidden_states(N), torch.randperm(F)
    before, state = sae(x), {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.permute_(order)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, state[name] if name == "b_dec" else state[name][order]), name
    assert_close(sae(x).reconstruction, before.reconstruction)
    assert_close(sae.encode(x).to_dense(), before.latents.to_dense()[:, order])


def test_latent_ids_survive_sorting_and_cutting():
    sae, order = make_sae("matryoshka-topk"), torch.randperm(F)
    assert sae.latent_ids.tolist() == list(range(F))
    directions = sae.W_dec.detach().clone()
    sae.permute_(order)
    again = torch.randperm(F)
    sae.permute_(again)
    small = sae.truncate(5)
    assert small.latent_ids.tolist() == order[again][:5].tolist()
    assert torch.equal(small.W_dec, directions[small.latent_ids])


# Folding


@each(variant=list(VARIANTS), fields=OPTIONS)
def test_folded_normalisation_takes_raw_inputs_exactly(variant, fields):
    sae, raw = make_sae(variant, **fields), hidden_states(N) * 5 + 2
    mean, scale = torch.randn(D, dtype=torch.float64), 3.7
    expected = sae((raw - mean) / scale)
    assert expected.latents.l0.sum() > 0
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    bandwidth = getattr(sae.config, "bandwidth", None)
    sae.fold_normalization_(mean, scale)
    folded = sae(raw)
    assert_close(folded.reconstruction, expected.reconstruction * scale + mean)
    assert_close(folded.latents.to_dense(), expected.latents.to_dense() * scale)
    assert_close(folded.loss, expected.loss * scale**2)
    if bandwidth is not None:
        assert sae.config.bandwidth == pytest.approx(bandwidth * scale)
    sae.fold_normalization_(-mean / scale, 1 / scale)  # the documented inverse
    for name, tensor in sae.state_dict().items():
        assert_close(tensor, state[name])
    if bandwidth is not None:
        assert sae.config.bandwidth == pytest.approx(bandwidth)


@pytest.mark.parametrize("variant", ["jumprelu", "matryoshka-jumprelu"])
def test_folded_normalisation_keeps_the_pairs_that_move_thresholds(variant):
    sae, raw = make_sae(variant).train(), hidden_states(N)
    mean, scale = torch.randn(D, dtype=torch.float64), 3.7
    before = sae.encode_pairs((raw - mean) / scale)
    sae.fold_normalization_(mean, scale)
    after = sae.encode_pairs(raw)
    assert (before.values == 0).any() and torch.equal(before.rows, after.rows) and torch.equal(before.cols, after.cols)


EXACT_FOLDS = [(variant, True) for variant in VARIANTS] + [
    (variant, False) for variant in VARIANTS if not variant.endswith("-topk") and variant != "topk"
]


@pytest.mark.parametrize(("variant", "scaled"), EXACT_FOLDS)
def test_folded_decoder_norms_leave_the_reconstruction(variant, scaled):
    sae, x = make_sae(variant, scale_by_decoder_norm=scaled), hidden_states(N)
    norms = sae.W_dec.norm(dim=1)
    before = sae(x)
    sae.fold_decoder_norm_()
    after = sae(x)
    assert_close(sae.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
    assert not sae.config.scale_by_decoder_norm
    assert_close(after.reconstruction, before.reconstruction)
    assert_close(after.loss, before.loss)
    assert_close(after.latents.to_dense(), before.latents.to_dense() * (1 if scaled else norms))
    assert before.latents.l0.sum() > 0


@pytest.mark.parametrize("variant", ["topk", "batch_topk", "matryoshka-topk", "matryoshka-batch_topk"])
def test_scaled_selection_in_training_is_that_of_the_folded_sae(variant):
    sae, x = make_sae(variant, scale_by_decoder_norm=True).train(), hidden_states(N)
    before = sae(x)
    sae.fold_decoder_norm_()
    assert_close(sae(x).latents.to_dense(), before.latents.to_dense())


@variants
def test_a_decoder_row_of_zeros_stays_silent_and_gives_no_nan(variant):
    sae, x = make_sae(variant, scale_by_decoder_norm=True).train(), hidden_states(N)
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae(x).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())
    reconstruction = sae.eval()(x).reconstruction
    sae.fold_decoder_norm_()
    assert not sae.W_dec[3].any()
    assert_close(sae(x).reconstruction, reconstruction)
