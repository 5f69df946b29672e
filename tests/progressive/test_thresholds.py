"""L0 counted densely at the thresholds that were found."""

import pytest
import torch

from hf_matryoshka_sae.models import BatchTopKSAEConfig, MatryoshkaSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.progressive.thresholds import calibrate_thresholds, with_threshold


WIDTHS = [8, 24, 64]


@pytest.fixture(params=[1.0, 1e4], ids=["unit", "large"])
def case(request):
    config = MatryoshkaSAEConfig(d_in=16, num_latents=64, k=6, activation="batch_topk", prefix_widths=WIDTHS)
    sae = build_sae(config).eval()
    sae.b_enc.data.normal_(-0.5)
    x = torch.randn(3000, 16) * request.param
    sae.b_enc.data *= request.param
    return sae, x


def l0(sae, x: torch.Tensor, width: int) -> float:
    return (sae.encode(x).to_dense()[:, :width] > 0).double().sum(1).mean().item()


def test_every_prefix_alone_fires_as_wanted(case):
    sae, x = case
    before = sae.threshold.clone()
    found = calibrate_thresholds(sae, x.split(700), 1.5)
    for width, threshold in found.items():
        assert l0(with_threshold(sae, width, threshold), x, width) == pytest.approx(1.5, rel=5e-3)
    assert list(found) == WIDTHS and torch.equal(sae.threshold, before)
    assert found[8] < found[24] < found[64]


def test_a_list_sets_one_threshold_for_each_group(case):
    sae, x = case
    calibrate_thresholds(sae, [x], [1.0, 3.0, 4.0])
    for width, wanted in zip(WIDTHS, [1.0, 3.0, 4.0], strict=True):
        assert l0(sae, x, width) == pytest.approx(wanted, rel=5e-3)
        assert l0(sae.truncate(width), x, width) == pytest.approx(wanted, rel=5e-3)


def test_any_widths_of_a_plain_dictionary():
    sae = build_sae(BatchTopKSAEConfig(d_in=16, num_latents=64, k=6)).eval()
    x = torch.randn(3000, 16)
    found = calibrate_thresholds(sae, [x], 4, widths=[10, 33])
    assert l0(with_threshold(sae, 33, found[33]), x, 33) == pytest.approx(4, rel=5e-3)


def test_more_than_ever_fires_gives_zero():
    sae = build_sae(BatchTopKSAEConfig(d_in=4, num_latents=8, k=2)).eval()
    assert calibrate_thresholds(sae, [torch.randn(50, 4)], 8.0) == {8: 0.0}


def test_what_does_not_fit_is_said():
    sae = build_sae(BatchTopKSAEConfig(d_in=4, num_latents=8, k=2))
    x = [torch.randn(5, 4)]
    with pytest.raises(ValueError, match="got topk"):
        calibrate_thresholds(build_sae(TopKSAEConfig(d_in=4, num_latents=8, k=2)), x, 1.0)
    with pytest.raises(ValueError, match="not decreasing"):
        calibrate_thresholds(sae, x, [2.0, 1.0], widths=[4, 8])
    with pytest.raises(ValueError, match="between 1 and 8"):
        calibrate_thresholds(sae, x, 1.0, widths=[9])
    with pytest.raises(ValueError, match="finite and of width"):
        calibrate_thresholds(sae, [torch.full((2, 4), torch.nan)], 1.0)
    with pytest.raises(ValueError, match="no hidden states"):
        calibrate_thresholds(sae, [], 1.0)
