import importlib

import pytest
import torch

from hf_matryoshka_sae.progressive.refit import refit

from ..axes import each
from ..models.reference import OPTIONS, VARIANTS, D, F, assert_close, dense_forward, hidden_states, make_sae


module = importlib.import_module("hf_matryoshka_sae.progressive.refit")  # the package gives the function this name


def _fvu(sae, x):
    residual = x - sae(x).reconstruction
    return (residual.square().sum() / (x - x.mean(0)).square().sum()).item()


@each(options=OPTIONS, variant=list(VARIANTS))
def test_the_bias_is_the_best_and_activations_stay(variant, options):
    sae, x = make_sae(variant, **options), hidden_states(60)
    found = refit(sae, [x])
    acts, prefixes, _ = dense_forward(sae, x)
    assert_close(found.sae.encode(x).to_dense(), acts.detach())
    assert_close(found.sae.b_dec.detach(), (sae.b_dec + (x - prefixes[-1]).mean(0)).detach())
    assert found.fvu_before == pytest.approx(_fvu(sae, x)) and found.fvu_after == pytest.approx(_fvu(found.sae, x))
    assert found.fvu_after < found.fvu_before and not found.held_out and found.tokens == 60
    assert found.l0_before == found.l0_after == (acts > 0).sum().item() / 60
    with torch.no_grad():  # no other bias does better
        nudged = [_fvu_with_bias(found.sae, x, step) for step in (1e-3, -1e-3)]
    assert min(nudged) > found.fvu_after


def _fvu_with_bias(sae, x, step):
    residual = x - sae(x).reconstruction - step * torch.ones(D, dtype=torch.float64)
    return (residual.square().sum() / (x - x.mean(0)).square().sum()).item()


def test_gains_are_measured_on_batches_that_took_no_part():
    sae, batches = make_sae("jumprelu"), list(hidden_states(90).split(10))
    fitted = torch.cat([batch for i, batch in enumerate(batches) if i % 4 != 3])
    fresh = torch.cat(batches[3::4])
    for decoder in (False, True):
        found = refit(sae, batches, decoder=decoder)
        assert found.held_out and found.tokens == 20
        assert found.fvu_before == pytest.approx(_fvu(sae, fresh))
        assert found.fvu_after == pytest.approx(_fvu(found.sae, fresh))
        alone = refit(sae, [fitted], decoder=decoder)
        assert_close(found.sae.W_dec, alone.sae.W_dec)
        assert_close(found.sae.b_dec, alone.sae.b_dec)


@each(options=OPTIONS, variant=list(VARIANTS))
def test_the_decoder_is_the_ridge_solution(variant, options, way):
    sae, x, ridge = make_sae(variant, **options), hidden_states(80), 0.1
    found = refit(sae, x.split(80), decoder=True, ridge=ridge)
    plain = make_sae_folded(sae)
    acts = dense_forward(plain, x)[0].detach()
    # Ridge towards the old rows, written as rows that are added to the least-squares problem.
    weight = ridge * acts.var(0, correction=0).mean()
    design = torch.cat([acts, torch.ones(80, 1, dtype=torch.float64)], 1)
    pull = (80 * weight).sqrt() * torch.eye(F, F + 1, dtype=torch.float64)
    target = torch.cat([x, pull[:, :F] @ plain.W_dec.detach()])
    solution = torch.linalg.lstsq(torch.cat([design, pull]), target).solution
    torch.testing.assert_close(found.sae.W_dec.detach(), solution[:F], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.sae.b_dec.detach(), solution[F], rtol=1e-7, atol=1e-8)
    assert_close(found.sae.encode(x).to_dense(), acts)
    assert found.fvu_before == pytest.approx(_fvu(sae, x)) and found.fvu_after == pytest.approx(_fvu(found.sae, x))
    assert found.fvu_after < refit(sae, [x]).fvu_after


def make_sae_folded(sae):
    folded = type(sae)(sae.config).to(torch.float64).eval()
    folded.load_state_dict(sae.state_dict())
    if sae.config.scale_by_decoder_norm:
        folded.config = type(sae.config)(**sae.config.to_dict())
        folded.fold_decoder_norm_()
    return folded


def test_rows_of_silent_latents_stay():
    sae, x = make_sae("relu"), hidden_states(40)
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    assert torch.equal(refit(sae, [x], decoder=True).sae.W_dec[5], sae.W_dec[5])
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    found = refit(sae, [x], decoder=True)
    assert_close(found.sae.b_dec.detach(), x.mean(0)) and found.fvu_after == pytest.approx(1)


# Thresholds


@each(
    l0=[0.5, 2.0, 4.0],
    variant=["batch_topk", "jumprelu", "matryoshka-batch_topk", "matryoshka-jumprelu"],
    options=OPTIONS,
)
def test_thresholds_are_rescaled_for_the_l0_asked(variant, l0, options):
    sae, batches = make_sae(variant, **options), list(hidden_states(2000).split(300))
    found = refit(sae, batches, l0=l0)
    ratio = found.sae.threshold / sae.threshold
    torch.testing.assert_close(ratio, ratio[:1].expand(F))
    x = torch.cat(batches)
    assert found.sae.encode(x).l0.double().mean().item() == pytest.approx(l0, rel=0.01)
    fresh = batches[3]
    assert found.l0_before == pytest.approx(sae.encode(fresh).l0.double().mean().item())
    assert found.l0_after == pytest.approx(found.sae.encode(fresh).l0.double().mean().item())
    assert found.fvu_before == pytest.approx(_fvu(sae, fresh))
    assert found.fvu_after == pytest.approx(_fvu(found.sae, fresh))


def test_thresholds_that_are_not_positive_stay():
    sae = make_sae("jumprelu")
    with torch.no_grad():
        sae.threshold[:3] = torch.tensor([-0.2, 0.0, -0.1])
    x = hidden_states(2000)
    found = refit(sae, [x], l0=3.0)
    assert torch.equal(found.sae.threshold[:3], sae.threshold[:3])
    assert found.l0_before == pytest.approx((dense_forward(sae, x)[0] > 0).sum().item() / 2000)
    assert found.l0_after == pytest.approx(3.0, rel=0.01)


def test_bad_arguments_are_refused(monkeypatch):
    sae, x = make_sae("jumprelu"), hidden_states(50)
    with pytest.raises(ValueError, match="between 0 and num_latents"):
        refit(sae, [x], l0=0)
    with pytest.raises(ValueError, match="No factor of the thresholds gives an L0 of 12"):
        refit(sae, [x], l0=12)
    with pytest.raises(ValueError, match="a topk SAE has none"):
        refit(make_sae("topk"), [x], l0=2)
    with pytest.raises(ValueError, match="pass a list or a `HeldOut`"):
        refit(sae, iter([x]), l0=2)
    with pytest.raises(ValueError, match="`ridge` must be above 0"):
        refit(sae, [x], decoder=True, ridge=0)
    for options in ({}, {"l0": 2}):
        with pytest.raises(ValueError, match="activations are empty"):
            refit(sae, [], **options)
    with pytest.raises(ValueError, match="1 of the 50 hidden states of batch 1 are not finite"):
        refit(sae, [x, x.index_fill(0, torch.tensor([4]), torch.nan)])
    monkeypatch.setattr(module, "MAX_DECODER_REFIT_LATENTS", 12)
    with pytest.raises(ValueError, match="at most 12 latents"):
        refit(sae, [x], decoder=True)


def _one_of_two(rank, x):
    found = refit(make_sae("jumprelu"), x.split(20)[rank::2], decoder=True, l0=2.0)
    return [found.fvu_before, found.fvu_after, found.l0_before, found.tokens], found.sae.state_dict()


def test_two_processes_agree_with_one(two_processes):
    x = hidden_states(160)
    torch.manual_seed(0)
    parts = x.split(20)
    joined = [torch.cat(parts[2 * i : 2 * i + 2]) for i in range(4)]  # batch i of both processes
    one = refit(make_sae("jumprelu"), joined, decoder=True, l0=2.0)
    for numbers, state in two_processes.run(_one_of_two, x):
        assert numbers == pytest.approx([one.fvu_before, one.fvu_after, one.l0_before, one.tokens])
        torch.testing.assert_close(dict(state), dict(one.sae.state_dict()))
