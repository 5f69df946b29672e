"""The threshold is solved on data for the L0 asked for, whatever the batches look like."""

import pytest
import torch

from hf_matryoshka_sae import (
    BatchTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAEConfig,
    ReluSAEConfig,
    build_sae,
)
from hf_matryoshka_sae.training.sae.calibration import calibrate_l0, calibrate_threshold


@pytest.mark.parametrize("batch", [64, 1000])
@pytest.mark.parametrize("k", [4, 7.5])
def test_k_latents_fire_per_token_on_the_data_and_nearly_so_on_other_data(batch, k):
    sae = build_sae(BatchTopKSAEConfig(d_in=16, num_latents=128, k=k)).eval()
    data, other = torch.randn(8000, 16), torch.randn(8000, 16)
    threshold = calibrate_threshold(sae, data.split(batch), k)
    assert not sae.training
    assert sae.k == k
    assert torch.equal(sae.threshold, torch.full((128,), threshold))
    with torch.no_grad():
        assert sae.encode(data).l0.float().mean().item() == pytest.approx(k, abs=2 / 8000)
        assert sae.encode(other).l0.float().mean().item() == pytest.approx(k, rel=0.02)


def test_restricting_equals_masking_at_every_prefix():
    sae = build_sae(MatryoshkaSAEConfig(d_in=16, num_latents=128, k=4)).eval()
    data = torch.randn(2000, 16)
    threshold = calibrate_threshold(sae, data.split(500), 4)
    for width in sae.prefix_widths:
        restricted = sae.encode(data, width=width).to_dense()
        masked = sae.encode(data, width=width, selection="mask").to_dense()
        # A matmul of another size rounds otherwise: a value at the very threshold may fall on either side.
        away = (torch.maximum(restricted, masked) - threshold).abs() > 1e-5
        assert torch.allclose(restricted[away], masked[away], atol=1e-5)
        assert away.float().mean() > 0.999


def test_rows_that_are_not_finite_are_left_out():
    sae = build_sae(BatchTopKSAEConfig(d_in=16, num_latents=128, k=4)).eval()
    data = torch.randn(2000, 16)
    spoiled = data.clone()
    spoiled[3] = torch.nan
    spoiled[700, 2] = torch.inf
    good = torch.ones(2000, dtype=torch.bool)
    good[[3, 700]] = False
    assert calibrate_threshold(sae, [spoiled], 4) == calibrate_threshold(sae, [data[good]], 4)
    with pytest.raises(ValueError, match="calibration_tokens"):
        calibrate_threshold(sae, [torch.full((5, 16), torch.nan)], 4)


def test_fewer_positive_values_than_k_give_a_threshold_of_zero():
    sae = build_sae(BatchTopKSAEConfig(d_in=4, num_latents=8, k=8)).eval()
    assert calibrate_threshold(sae, [torch.randn(50, 4)], 8) == pytest.approx(0.0, abs=1e-6)


LEARNT = {
    "relu": ReluSAEConfig(d_in=16, num_latents=128, apply_b_dec_to_input=False),
    "jumprelu": JumpReLUSAEConfig(d_in=16, num_latents=128, initial_threshold=0.4),
    "gated": GatedSAEConfig(d_in=16, num_latents=128),
    "nested": MatryoshkaSAEConfig(d_in=16, num_latents=128, activation="jumprelu", initial_threshold=2.0),
}


@pytest.mark.parametrize("base", [0, 20])
@pytest.mark.parametrize("name", LEARNT)
def test_all_thresholds_move_alike_to_the_target(name, base):
    sae = build_sae(LEARNT[name]).eval()
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(128) * 0.1)  # of a Gated SAE some magnitudes are 0 though the gate is open
        sae.b_dec.copy_(torch.randn(16) * 0.1)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    data = torch.randn(4000, 16)
    spoiled = torch.cat([data, torch.full((3, 16), torch.nan)])
    fired = sae.encode(data).to_dense() > 0
    shift = calibrate_l0(sae, spoiled.split(500), 14.0, base=base)
    with torch.no_grad():
        values = sae.encode(data).to_dense()
    assert (values > 0).sum(1).float().mean().item() == pytest.approx(14.0, abs=2e-3)
    assert torch.equal((values > 0)[:, :base], fired[:, :base])
    moved = "threshold" if "jumprelu" in (name, getattr(sae.config, "activation", None)) else "b_enc"
    before[moved][base:] += shift if moved == "threshold" else -shift
    for key, value in sae.state_dict().items():
        assert torch.allclose(value, before[key], atol=1e-6), key


def test_magnitudes_of_a_gated_sae_do_not_know_its_thresholds():
    sae = build_sae(LEARNT["gated"]).eval()
    data = torch.randn(500, 16)
    before = sae.encode(data).to_dense()
    calibrate_l0(sae, [data], 4.0)
    after = sae.encode(data).to_dense()
    both = (before > 0) & (after > 0)
    assert both.sum() > 100
    assert torch.allclose(before[both], after[both], atol=1e-6)


def test_batches_that_hold_most_of_the_pairs_are_read_again():
    sae, data = build_sae(LEARNT["jumprelu"]).eval(), torch.randn(1000, 16)
    data[:100] *= 20  # of the first batch nearly half of the latents fire
    calibrate_l0(sae, data.split(100), 6.0)
    with torch.no_grad():
        assert (sae.encode(data).to_dense() > 0).sum(1).float().mean().item() == pytest.approx(6.0, abs=0.01)
