"""Fits of power laws against samples whose law is known, and against other ways to the same numbers."""

import json

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from hf_matryoshka_sae.models import MatryoshkaSAEConfig, build_sae
from hf_matryoshka_sae.progressive.power_law import (
    _against_exponential,
    _against_log_normal,
    decoder_spectrum,
    fit_power_law,
)
from hf_matryoshka_sae.progressive.power_law_plot import plot_power_laws


def pareto(count: int, alpha: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).pareto(alpha - 1, count) + 1


def with_body(count: int, alpha: float, seed: int = 0) -> np.ndarray:
    """Half below 1 and no power law, half a power law from 1 on."""
    body = np.random.default_rng(seed + 1000).uniform(0, 1, count // 2)
    return np.concatenate([body, pareto(count // 2, alpha, seed)])


@pytest.mark.parametrize("sample", [pareto, with_body])
def test_exponent_lies_in_its_interval(sample):
    covers = []
    for alpha, first in ((1.6, 0), (2.5, 10), (6.0, 20)):
        for seed in range(first, first + 8):
            fit = fit_power_law(sample(400, alpha, seed), resamples=20)
            (low, high), (least, most) = fit.alpha_interval, fit.rank_exponent_interval
            covers.append(low <= alpha <= high and least <= 1 / (alpha - 1) <= most)
            assert fit.interval_from == "bootstrap"
    assert np.mean(covers) > 0.8


def test_interval_for_a_given_minimum_covers_as_often_as_it_says():
    covers = []
    for seed in range(250):
        low, high = fit_power_law(pareto(100, 3.0, seed), minimum=1.0, resamples=0).alpha_interval
        covers.append(low <= 3.0 <= high)
    assert 0.91 <= np.mean(covers) <= 0.985


def test_minimum_is_found_where_the_power_law_starts():
    fit = fit_power_law(with_body(4000, 2.5), resamples=0)
    assert 0.95 < fit.minimum < 1.5
    assert fit.tail == (with_body(4000, 2.5) >= fit.minimum).sum()
    assert fit.tail_share == fit.tail / 4000


def test_estimate_and_distance_equal_scipys():
    values = pareto(500, 2.2)
    fit = fit_power_law(values, minimum=1.0, resamples=0)
    shape, _, _ = stats.pareto.fit(values, floc=0, fscale=1.0)
    assert fit.alpha == pytest.approx(1 + shape, rel=1e-6)
    assert fit.ks_distance == pytest.approx(stats.kstest(values, stats.pareto(shape).cdf).statistic, rel=1e-9)


def test_power_laws_are_accepted():
    fits = [fit_power_law(with_body(1000, 2.5, seed), resamples=20) for seed in range(5)]
    assert [fit.verdict for fit in fits].count("power law") >= 4
    assert sum(fit.p_value > 0.1 for fit in fits) >= 4


@pytest.mark.parametrize(
    ("draw", "verdicts"),
    [
        # Cut off at 0, a normal distribution can look like an exponential one of y.
        (lambda rng: rng.exponential(1, 3000), {"exponential", "log-normal"}),
        (lambda rng: rng.lognormal(0, 1, 3000), {"log-normal"}),
        (lambda rng: rng.lognormal(-8, 2, 3000), {"log-normal"}),
        (lambda rng: rng.uniform(0, 1, 3000), {"log-normal", "exponential", "none"}),
    ],
    ids=["exponential", "log-normal", "wide log-normal", "uniform"],
)
def test_other_laws_are_rejected(draw, verdicts):
    fits = [fit_power_law(draw(np.random.default_rng(seed)), resamples=20) for seed in range(3)]
    assert {fit.verdict for fit in fits} <= verdicts
    assert np.mean([fit.p_value for fit in fits]) < 0.2


def test_p_values_of_a_power_law_are_uniform():
    values = (pareto(100, 2.5, seed) for seed in range(150))
    fits = [fit_power_law(sample, minimum=1.0, resamples=30, seed=1000 + seed) for seed, sample in enumerate(values)]
    p_values = [fit.p_value for fit in fits]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_log_normal_ratio_equals_numerical_maximum_likelihood():
    """Dense reference: the density of y is integrated numerically and its likelihood climbed without gradients."""
    excess = np.random.default_rng(0).normal(1.0, 1.5, 400)
    excess = excess[excess > 0]

    def loss(parameters: np.ndarray) -> float:
        mean, deviation = parameters[0], np.exp(parameters[1])
        total, _ = integrate.quad(lambda y: np.exp(-(((y - mean) / deviation) ** 2) / 2), 0, 30, points=[1.0])
        return float(np.sum(((excess - mean) / deviation) ** 2 / 2) + len(excess) * np.log(total))

    best = -optimize.minimize(loss, [0.5, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}).fun
    rate = 1 / excess.mean()
    found = _against_log_normal(excess, rate)
    assert found.log_ratio == pytest.approx(np.sum(np.log(rate) - rate * excess) - best, abs=1e-5)
    assert found.p_value < 1e-3


def test_exponential_ratio_equals_scipys_densities():
    values = 3 * pareto(300, 2.5)
    excess = np.log(values / 3)
    found = _against_exponential(excess, 1 / excess.mean())
    law = stats.pareto(1 / excess.mean(), scale=3).logpdf(values)
    other = stats.expon(3, values.mean() - 3).logpdf(values)
    assert found.log_ratio == pytest.approx((law - other).sum())
    z_score = (law - other).sum() / ((law - other).std() * np.sqrt(len(values)))
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(z_score)))


def test_scale_changes_nothing_but_the_minimum():
    values = with_body(600, 2.5)
    fit, scaled = (fit_power_law(factor * values, resamples=20).to_dict() for factor in (1.0, 1e-9))
    assert scaled.pop("minimum") == pytest.approx(1e-9 * fit.pop("minimum"))
    assert json.dumps(scaled, default=float) == json.dumps(fit) or _close(scaled, fit)


def _close(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_close(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return all(_close(*pair) for pair in zip(left, right, strict=True))
    return left == right or left == pytest.approx(right, rel=1e-6)


def test_least_squares_on_an_exact_law_gives_its_exponent():
    rank = np.arange(1, 501)
    line = fit_power_law(rank**-0.7, resamples=0).least_squares
    assert line.ranks == (1, 500)
    assert line.exponent == pytest.approx(0.7)
    assert line.r2 == pytest.approx(1)
    assert line.r2 > max(line.r2_exponential, line.r2_log_normal)


def test_least_squares_names_the_alternative_that_is_straight():
    rank = np.arange(1, 501)
    exponential = fit_power_law(np.exp(-0.02 * rank), resamples=0).least_squares
    log_normal = fit_power_law(np.exp(stats.norm.ppf((rank - 0.5) / 500)), resamples=0).least_squares
    assert exponential.r2_exponential == pytest.approx(1) and exponential.r2 < 0.9
    assert log_normal.r2_log_normal == pytest.approx(1) and log_normal.r2 < 0.9


def test_least_squares_keeps_to_its_ranks():
    values = np.concatenate([np.full(20, 30.0), np.arange(21, 501.0) ** -2])
    assert fit_power_law(values, ranks=(21, 500), resamples=0).least_squares.exponent == pytest.approx(2)
    with pytest.raises(ValueError, match="between 1 and 500"):
        fit_power_law(values, ranks=(0, 500), resamples=0)
    with pytest.raises(ValueError, match="all the same"):
        fit_power_law(values, ranks=(1, 20), resamples=0)


def test_zeros_and_order_change_nothing():
    values = torch.tensor(pareto(300, 2.5))
    padded = torch.cat([values, torch.zeros(45)])[torch.randperm(345)]
    fit, with_zeros = fit_power_law(values, resamples=20), fit_power_law(padded, resamples=20)
    assert with_zeros.zeros == 45 and with_zeros.values == 345
    assert (with_zeros.alpha, with_zeros.p_value, with_zeros.tail) == (fit.alpha, fit.p_value, fit.tail)


def test_same_seed_same_fit_as_json_and_in_a_line():
    fit = fit_power_law(pareto(300, 2.5), resamples=20, seed=3)
    assert fit == fit_power_law(pareto(300, 2.5), resamples=20, seed=3)
    assert json.loads(json.dumps(fit.to_dict()))["exponential"]["log_ratio"] == fit.exponential.log_ratio
    assert "\n" not in str(fit) and f"{fit.rank_exponent:.3f}" in str(fit)


def test_ties_of_rare_counts_are_left_below_the_minimum():
    """Frequencies over few tokens: counts of a few are steps."""
    fit = fit_power_law(np.floor(pareto(5000, 2.0)) / 1000, resamples=0)
    assert fit.minimum >= 0.003
    assert fit.alpha == pytest.approx(2.0, abs=0.25)


@pytest.mark.parametrize(
    ("importance", "options", "message"),
    [
        (np.ones(49).cumsum(), {}, "needs 50 values above 0, got 49"),
        (np.ones(200), {}, "constant"),
        (np.r_[np.ones(200), np.nan], {}, "1 of 201 values are not"),
        (np.r_[np.ones(200), np.inf], {}, "must be finite"),
        (np.arange(-1, 200.0), {}, "negative; 1 of 201"),
        (np.ones((100, 2)), {}, r"\[F\], got shape \(100, 2\)"),
        (np.arange(200.0), {"minimum": 170.0}, "at least `minimum`"),
        (np.arange(200.0), {"minimum": 0.0}, "above 0, got 0.0"),
        (np.arange(200.0), {"resamples": 3}, "at least 20, got 3"),
    ],
)
def test_bad_input_is_an_error_that_says_what_came(importance, options, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(importance, **options)


@pytest.mark.parametrize("shape", [(300, 16), (10, 16)])
def test_spectrum_equals_singular_values_of_the_centred_decoder(shape):
    rows = torch.randn(shape)
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    expected = np.linalg.svd(centred, compute_uv=False) ** 2 / len(rows)
    spectrum = decoder_spectrum(rows)
    assert spectrum.dtype == torch.float64 and len(spectrum) == min(shape)
    np.testing.assert_allclose(spectrum, expected, rtol=1e-9, atol=1e-13)


def test_spectrum_has_zeros_where_the_decoder_has_no_directions():
    spectrum = decoder_spectrum(torch.randn(300, 4) @ torch.randn(4, 32))
    assert (spectrum > 1e-9).sum() == 4
    assert (decoder_spectrum(torch.randn(300, 4).double() @ torch.randn(4, 32).double())[4:] == 0).all()


def test_spectrum_of_an_sae_is_that_of_its_decoder():
    sae = build_sae(MatryoshkaSAEConfig(d_in=64, num_latents=256, k=4, prefix_widths=[64, 256]))
    assert torch.equal(decoder_spectrum(sae), decoder_spectrum(sae.W_dec))
    assert fit_power_law(decoder_spectrum(sae), resamples=0).values == 64
    with pytest.raises(ValueError, match=r"num_latents, d_in\], got \(64,\)"):
        decoder_spectrum(torch.zeros(64))


def test_plot_is_one_whole_file(tmp_path):
    values = with_body(200, 2.5)
    fit = fit_power_law(values, resamples=0)
    plot_power_laws({name: (torch.tensor(values), fit) for name in ("energy", "frequency")}, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="empty"):
        plot_power_laws({}, tmp_path / "b.png")
