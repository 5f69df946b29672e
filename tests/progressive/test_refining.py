"""Refined SAEs fire as often as before, and explain more."""

import pytest
import torch

from hf_matryoshka_sae import convert
from hf_matryoshka_sae.convert.saebench import to_saebench
from hf_matryoshka_sae.models import (
    BatchTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAEConfig,
    ReluSAEConfig,
    TopKSAEConfig,
    build_sae,
)
from hf_matryoshka_sae.progressive import (
    RateSums,
    calibrate_thresholds,
    latent_statistics,
    progressive_curve,
    prune,
    refined,
    refit,
)


D, F = 16, 64
CONFIGS = {
    "relu": ReluSAEConfig(d_in=D, num_latents=F),
    "topk": TopKSAEConfig(d_in=D, num_latents=F, k=5),
    "batch_topk": BatchTopKSAEConfig(d_in=D, num_latents=F, k=5),
    "jumprelu": JumpReLUSAEConfig(d_in=D, num_latents=F),
    "gated": GatedSAEConfig(d_in=D, num_latents=F),
    "matryoshka": MatryoshkaSAEConfig(d_in=D, num_latents=F, k=5, prefix_widths=[8, 24, F]),
}


def sae_and_states(family: str):
    """An SAE whose decoder made the hidden states: five of its latents each, of strength 1 to 2."""
    sae = build_sae(CONFIGS[family]).eval()
    latents = torch.rand(4000, F).topk(5).indices
    codes = torch.zeros(4000, F).scatter(1, latents, 1 + torch.rand(4000, 5))
    with torch.no_grad():
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.9)
        elif family != "topk":
            sae.b_enc.fill_(-0.9)
    return sae, codes @ sae.W_dec.detach()


def l0_and_error(sae, x):
    with torch.no_grad():
        output = sae(x)
    return output.latents.l0.float().mean().item(), (output.reconstruction - x).square().sum(1).mean().item()


@pytest.mark.parametrize("family", CONFIGS)
def test_as_sparse_as_before_and_nearer(family):
    sae, x = sae_and_states(family)
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    better = refined(sae, x.split(900), steps=2)
    before, after = l0_and_error(sae, x), l0_and_error(better, x)
    assert after[0] == pytest.approx(before[0], rel=2e-3) and after[1] < 0.9 * before[1]
    assert type(better) is type(sae) and sae.config.refine_steps == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in sae.state_dict().items())


def test_an_l0_may_be_asked_for_and_steps_taken_back():
    sae, x = sae_and_states("matryoshka")
    assert l0_and_error(refined(sae, x, l0=3.0), x)[0] == pytest.approx(3.0, rel=2e-3)
    back = refined(refined(sae, x), x, steps=0)
    assert torch.allclose(back.threshold, sae.threshold, rtol=5e-3)


def test_what_reads_an_encoder_as_one_product_says_so(tmp_path):
    sae, x = sae_and_states("batch_topk")
    better = refined(sae, x)
    with pytest.raises(ValueError, match="refine_steps"):
        convert.save(better, tmp_path / "theirs", "dictionary_learning")
    assert convert.able_to_write(better) == ["hf_matryoshka_sae"]
    with pytest.raises(ValueError, match="refined"):
        calibrate_thresholds(better, [x], 3)
    with pytest.raises(ValueError, match="refined"):
        refit(better, [x], l0=3.0)
    with pytest.raises(ValueError, match="refine_steps"):
        to_saebench(better, model_name="gpt2-small", hook_name="blocks.0.hook_resid_post")


def test_a_pruned_one_is_refitted_to_its_k():
    sae, x = sae_and_states("batch_topk")
    better = refined(sae, x, steps=2)
    smaller = prune(better, width=40, activations=[x], refit=True)
    l0, error = l0_and_error(smaller, x)
    assert smaller.config.refine_steps == 2 and l0 == pytest.approx(5, rel=2e-2)
    assert error < l0_and_error(prune(sae, width=40, activations=[x], refit=True), x)[1]


def test_a_curve_counts_the_bits_of_each_width_s_own_codes():
    sae, x = sae_and_states("matryoshka")
    better = refined(sae, x, steps=2)
    statistics = latent_statistics(better, [x])
    curve = progressive_curve(better, [x], [24, F], "restrict", statistics, step=0.1, show=False)
    masked = progressive_curve(better, [x], [24, F], "mask", statistics, step=0.1, show=False)
    sums = RateSums(statistics, [24, F], 0.1)
    sums.add(better.encode_pairs(x, 24))
    assert curve.rows[0]["bits"] == pytest.approx(sums.bits_per_token()["bits"][0].item())
    assert curve.rows[0]["bits"] > 1.02 * masked.rows[0]["bits"] and curve.rows[1]["bits"] == masked.rows[1]["bits"]


def test_steps_that_overshoot_are_told(caplog):
    sae, x = sae_and_states("topk")
    refined(sae, x, steps=1)
    assert not caplog.text
    refined(sae, x, steps=8, step_size=1.0)
    assert "smaller `step_size`" in caplog.text


def test_bad_requests_are_refused():
    sae, x = sae_and_states("batch_topk")
    with pytest.raises(ValueError, match="width d_in = 16"):
        refined(sae, x[:, :8])
    with pytest.raises(ValueError, match="more than once"):
        prune(refined(sae, x), width=40, order=torch.arange(F), activations=iter([x]), refit=True)
    with pytest.raises(ValueError, match="keeps k = 5"):
        refined(sae_and_states("topk")[0], l0=3.0)
    with pytest.raises(ValueError, match="Pass hidden states"):
        refined(sae)
    with pytest.raises(ValueError, match="between 0 and"):
        refined(sae, x, l0=F + 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        refined(sae, x, steps=-1)
