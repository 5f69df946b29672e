"""The step of a code, and its rate and distortion beside a linear code."""

import logging
import math

import pytest
import torch

from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, build_sae
from hf_matryoshka_sae.progressive import (
    choose_step,
    decode_progressive,
    encode_progressive,
    latent_statistics,
    rate_distortion,
    step_cost,
)

from ...evaluation.planted import EMBEDDING


D, F = 16, 48


@pytest.fixture(scope="module")
def world():
    """An SAE that reconstructs hidden states with an error, its statistics, and other hidden states."""
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(F, D), dim=1)
    sae = build_sae(MatryoshkaSAEConfig(d_in=D, num_latents=F, prefix_widths=[8, F], activation="topk", k=4)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)

    def draw(count):
        values = torch.rand(count, F).mul(3) * (torch.rand(count, F) < 3 / F)
        return values @ rows + 0.05 * torch.randn(count, D)

    return sae, latent_statistics(sae, [draw(4000)], neighbours=0), draw(1500)


def fvu(x, other):
    return float((x - other).square().sum() / (x - x.mean(0)).square().sum())


def test_the_step_is_the_largest_whose_growth_is_small(world):
    sae, statistics, x = world
    step = choose_step(sae, x, statistics)
    cost, coarser = (step_cost(sae, x, statistics, each) for each in (step, 1.2 * step))
    assert 0 < cost.growth <= 0.021 < coarser.growth
    decoded = decode_progressive(sae, encode_progressive(sae, x, statistics, step=step), statistics)
    assert cost.fvu_coded[-1] == pytest.approx(fvu(x, decoded), rel=1e-4)
    assert cost.fvu[-1] == pytest.approx(fvu(x, sae.decode(sae.encode(x)).detach()), rel=1e-4)
    assert f"({cost.growth:+.1%})" in str(cost)


def test_coding_says_what_the_step_costs_and_which_cut_is_worse_than_nothing(world, caplog):
    sae, statistics, x = world
    with caplog.at_level(logging.INFO, logger="hf_matryoshka_sae"):
        default = encode_progressive(sae, x, statistics)
    assert default == encode_progressive(sae, x, statistics, step=choose_step(sae, x, statistics))
    assert "bits a token, FVU" in caplog.text and "instead of" in caplog.text
    with torch.no_grad():
        sae.W_dec[:8].mul_(-4)
    told = str(step_cost(sae, x, statistics, 0.1))
    with torch.no_grad():
        sae.W_dec[:8].div_(-4)
    assert "cut at 8" in told and "worse than the mean" in told


def test_quantised_components_of_a_gaussian_have_the_rate_of_theory():
    # At high rate a scalar quantiser with an ideal entropy code takes h(x) - log2 step bits, its error is step^2 / 12.
    from hf_matryoshka_sae.evaluation.baselines import PrincipalComponents
    from hf_matryoshka_sae.progressive.coding.rate_distortion import QuantisedComponents

    torch.manual_seed(0)
    scales = torch.tensor([4.0, 2.0, 1.0])
    sample, x = (torch.randn(40_000, 3) * scales for _ in range(2))
    step = 0.5
    coder = QuantisedComponents(PrincipalComponents.fit([sample], [1]), [step], sample)
    entropy = sum(0.5 * math.log2(2 * math.pi * math.e * float(scale) ** 2) - math.log2(step) for scale in scales)
    assert coder.bits(x)[0] == pytest.approx(entropy, rel=0.01)
    assert float((coder.reconstruct(x)[0] - x).square().mean()) == pytest.approx(step**2 / 12, rel=0.02)


def test_rate_and_distortion_of_a_language_models_states():
    data = open_heldout("embedded", EMBEDDING, tokens=1500)
    fit = list(open_heldout("embedded", EMBEDDING, {"path": "embedded", "split": "train"}, tokens=1500).activations())
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(d_in=fit[0].shape[1], num_latents=64, prefix_widths=[16, 64], activation="topk", k=4)
    sae = build_sae(config).eval()
    found = rate_distortion(data, fit, sae, latent_statistics(sae, fit, neighbours=0), [0.1, 1.0], show=False)
    linear = found.subject("principal components")
    assert [row["fvu"] for row in linear] == sorted(row["fvu"] for row in linear)
    assert [row["bits"] for row in linear] == sorted((row["bits"] for row in linear), reverse=True)
    assert linear[0]["fvu"] < 0.1 and linear[0]["recaptured"] > 0.9
    fine, coarse = (found.subject(f"code, step {step}") for step in ("0.1", "1"))
    assert all(one["bits"] > two["bits"] for one, two in zip(fine, coarse, strict=True))
    assert len(found.figure().axes) == 2
