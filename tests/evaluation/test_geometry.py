"""Geometry against explicit loops over pairs of rows, in float64, and densities against numpy."""

import math

import numpy as np
import pytest
import torch

from hf_matryoshka_sae import MatryoshkaSAEConfig, ReluSAEConfig, build_sae
from hf_matryoshka_sae.evaluation.firing import FiringSums
from hf_matryoshka_sae.evaluation.geometry import density_metrics, max_cosines, weight_geometry


D, F, WIDTHS = 5, 23, [1, 4, 11, 23]


def _sae(**fields):
    sae = build_sae(MatryoshkaSAEConfig(**{"d_in": D, "num_latents": F, "prefix_widths": WIDTHS, "k": 3} | fields))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(F, D))
        sae.W_dec.copy_(torch.randn(F, D))
        sae.b_enc.copy_(torch.randn(F))
    return sae.eval()


def _cosine(a, b):
    return float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))


def _loops(rows, width):
    """For each row below `width`, the largest cosine with another that is not zero; None where there is none."""
    rows = rows.detach().double().numpy()[:width]
    alive = [i for i in range(width) if rows[i].any()]
    return {i: max((_cosine(rows[i], rows[j]) for j in alive if j != i), default=None) for i in alive}


@pytest.mark.parametrize("block", [1, 4, 23, None])
def test_largest_cosines_of_every_prefix_are_those_of_a_loop_over_pairs(block):
    sae = _sae()
    with torch.no_grad():
        sae.W_dec[6] = 0
    found = [(rows, max_cosines(rows.detach(), WIDTHS, block)) for rows in (sae.W_enc, sae.W_dec)]
    for p, width in enumerate(WIDTHS):
        for rows, maxima in found:
            expected = _loops(rows, width)
            for i in range(width):
                if expected.get(i) is None:
                    assert maxima[i, p].isnan()
                else:
                    assert maxima[i, p].item() == pytest.approx(expected[i], abs=1e-5)


def test_means_are_over_latents_with_a_direction():
    sae = _sae()
    with torch.no_grad():
        sae.W_dec[2] = 0
        sae.W_enc[3] = 0
    rows = weight_geometry(sae)
    assert [row["width"] for row in rows] == WIDTHS
    assert rows[0]["average_max_decoder_cosine_sim"] is None  # one latent has no other
    assert rows[0]["effective_rank"] is rows[0]["participation_ratio"] is rows[0]["share_near_duplicates"] is None
    W_enc, W_dec = (weight.detach().double().numpy() for weight in (sae.W_enc, sae.W_dec))
    for row, width in zip(rows[1:], WIDTHS[1:], strict=True):
        for name, weight in (("encoder", sae.W_enc), ("decoder", sae.W_dec)):
            largest = list(_loops(weight, width).values())
            assert row[f"average_max_{name}_cosine_sim"] == pytest.approx(np.mean(largest), abs=1e-5)
            assert row[f"{name}_norm"] == pytest.approx(weight[:width].norm(dim=1).mean().item())
            assert row[f"zero_{name}_rows"] == 1
        both = [_cosine(W_enc[i], W_dec[i]) for i in range(width) if i not in (2, 3)]
        assert row["encoder_decoder_cosine_sim"] == pytest.approx(np.mean(both), abs=1e-5)
        assert row["encoder_bias"] == pytest.approx(sae.b_enc[:width].mean().item(), abs=1e-6)


def test_spread_of_the_decoder_is_that_of_numpys_covariance_and_ignores_lengths():
    sae = _sae()
    unit = (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).detach().double().numpy()
    rows = weight_geometry(sae)
    for row, width in zip(rows[1:], WIDTHS[1:], strict=True):
        eigenvalues = np.linalg.svd(np.cov(unit[:width].T, bias=True))[1]
        shares = eigenvalues / eigenvalues.sum()
        shares = shares[shares > 1e-12]
        assert row["participation_ratio"] == pytest.approx(1 / (shares**2).sum(), rel=1e-5)
        assert row["effective_rank"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(F, 1) + 0.1)
    for before, after in zip(rows[1:], weight_geometry(sae)[1:], strict=True):
        assert after["effective_rank"] == pytest.approx(before["effective_rank"], rel=1e-4)
        assert after["average_max_decoder_cosine_sim"] == pytest.approx(
            before["average_max_decoder_cosine_sim"], abs=1e-5
        )


def test_known_dictionaries_have_known_redundancy():
    sae = build_sae(ReluSAEConfig(d_in=4, num_latents=8))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
    (row,) = weight_geometry(sae)
    assert row["effective_rank"] == pytest.approx(4)
    assert row["participation_ratio"] == pytest.approx(4)
    assert row["average_max_decoder_cosine_sim"] == pytest.approx(0, abs=1e-6)
    assert row["share_near_duplicates"] == 0
    with torch.no_grad():
        sae.W_dec[4:7] = 3 * sae.W_dec[:3]
    (row,) = weight_geometry(sae)
    assert row["share_near_duplicates"] == 6 / 8


def _firing(fired, tokens):
    firing = FiringSums(len(fired))
    firing.fired += fired
    firing.tokens += tokens
    return firing


def test_shares_and_histogram_of_densities():
    counts = torch.tensor([0, 0, 5, 10, 11, 100, 101, 1000])
    narrow, wide = density_metrics(_firing(counts, 1000), [4, 8])
    assert narrow["frac_alive"] == 0.5
    assert narrow["freq_over_1_percent"] == 0
    assert wide["frac_alive"] == 6 / 8
    assert wide["freq_over_1_percent"] == 4 / 8
    assert wide["freq_over_10_percent"] == 2 / 8
    assert wide["normalized_freq_over_1_percent"] == pytest.approx(1212 / 1227)
    assert wide["normalized_freq_over_10_percent"] == pytest.approx(1101 / 1227)
    expected = np.histogram(np.log10(counts[2:].numpy() / 1000), np.linspace(-8, 0, 33))[0]
    assert wide["density_histogram"] == expected.tolist()
    assert sum(wide["density_histogram"]) == 6
    (silent,) = density_metrics(_firing(torch.zeros(3, dtype=torch.int64), 10), [3])
    assert silent["frac_alive"] == 0 and silent["normalized_freq_over_1_percent"] is None


def test_wrong_input_is_named():
    sae = _sae()
    for widths in ([], [4, 4], [0, 3], [5, 24]):
        with pytest.raises(ValueError, match="strictly increase"):
            weight_geometry(sae, widths)
    with pytest.raises(ValueError, match="nothing was counted"):
        density_metrics(FiringSums(4), [2])
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        weight_geometry(sae)


def test_latents_past_the_last_width_do_not_count():
    sae = _sae()
    assert weight_geometry(sae, [3, 11]) == weight_geometry(sae.truncate(11), [3, 11])
