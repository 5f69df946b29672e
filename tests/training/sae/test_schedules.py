"""Schedules against their formulas."""

import math

import pytest

from hf_matryoshka_sae import TopKSAEConfig
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae.schedules import (
    adam_betas,
    annealed_k,
    dead_window,
    learning_rate,
    peak_rate,
    random_prefix_widths,
    sparsity_warmup,
    weights_progress,
)


def spec(**fields):
    return SAESpec.from_dict({"preset": "paper", **fields}, "")


def sizes(num_latents, d_in=64):
    return TopKSAEConfig(d_in=d_in, num_latents=num_latents)


def test_default_learning_rate_turns_rows_by_the_same_angle_at_every_width():
    one = spec(lr=None, lr_base=None, lr_warmup_steps=0)
    rates = [learning_rate(one, sizes(16384, d_in), 0, 100) for d_in in (64, 256)]
    assert rates[1] == pytest.approx(rates[0] / 2)
    assert learning_rate(one, sizes(64), 0, 100) == pytest.approx(0.25 / 8)


def test_a_short_run_gets_a_higher_rate_but_not_one_that_kills():
    one = SAESpec.from_dict({"type": "batch_topk"}, "")
    usual = peak_rate(one, sizes(4096), 1400)
    assert peak_rate(one, sizes(4096), 10**5) == usual
    assert peak_rate(one, sizes(4096), 700) == pytest.approx(2**0.5 * usual)
    assert peak_rate(one, sizes(4096), 350) == peak_rate(one, sizes(4096), 20) == pytest.approx(2 * usual)
    assert peak_rate(spec(), sizes(4096), 20) == pytest.approx(3e-4)  # a published recipe stays as it is


def test_warm_up_is_half_as_long_again_where_the_rate_is_twice_as_high():
    one = SAESpec.from_dict({"type": "batch_topk"}, "")
    for steps, warmup in ((2000, 100), (350, 26)):  # a twentieth; 1.5 twentieths
        rates = [learning_rate(one, sizes(4096), step, steps) for step in range(warmup + 1)]
        falls = [1 - step / steps for step in range(warmup + 1)]
        climbs = [rate / fall / peak_rate(one, sizes(4096), steps) for rate, fall in zip(rates, falls, strict=True)]
        assert climbs == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup + 1)])


def test_a_short_run_forgets_faster_unless_betas_are_given():
    one = SAESpec.from_dict({"type": "topk", "betas_steps": 1000}, "")
    for steps, forgets in ((4000, 0.01), (1000, 0.01), (500, 0.02), (200, 0.05), (20, 0.05)):
        assert adam_betas(one, steps) == pytest.approx((0.7, 1 - forgets))
    for given in ({"type": "topk", "betas": [0.9, 0.999]}, {"preset": "paper"}):
        assert adam_betas(SAESpec.from_dict(given, ""), 20) == pytest.approx((0.9, 0.999))


def test_level_weights_of_a_short_run_stay_near_their_beginning():
    one = SAESpec.from_dict({}, "")
    assert weights_progress(one, 350, 700) == pytest.approx(0.25)
    assert weights_progress(one, 1500, 3000) == pytest.approx(0.5)
    given = SAESpec.from_dict({"level_weights_end": "whole"}, "")
    assert weights_progress(given, 350, 700) == pytest.approx(0.5)
    assert weights_progress(spec(level_weights_end="whole"), 300, 600) == pytest.approx(0.5)


def test_dead_window_is_a_share_of_the_run_and_bounded():
    one = spec(dead_tokens=None)
    assert dead_window(one, 3_000_000, 2048) == 20_480
    assert dead_window(one, 300_000_000, 2048) == 2_000_000
    assert dead_window(one, 10**11, 2048) == 10_000_000
    assert dead_window(spec(dead_tokens=5), 10**11, 2048) == 5


def test_learning_rate_follows_one_over_root_of_latents():
    one = spec(lr=None, lr_base=2e-4, lr_warmup_steps=0, lr_decay_fraction=0.0)
    assert learning_rate(one, sizes(16384), 5, 100) == pytest.approx(2e-4)
    assert learning_rate(one, sizes(4 * 16384), 5, 100) == pytest.approx(1e-4)


def test_learning_rate_warms_up_stays_and_decays():
    one = spec(lr=1.0, lr_warmup_steps=9, lr_decay_fraction=0.2, lr_end=0.1)
    rates = [learning_rate(one, sizes(64), step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 20)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_k_anneals_linearly_and_ends_exactly():
    one = spec(k_start=64, k_anneal_steps=10)
    assert annealed_k(one, 16, 0, 100) == 64
    assert annealed_k(one, 16, 5, 100) == pytest.approx(40)
    assert annealed_k(one, 16, 10, 100) == 16
    assert isinstance(annealed_k(one, 16, 50, 100), int)
    assert annealed_k(spec(), 16, 0, 100) == 16


def test_sparsity_warms_up():
    one = spec(sparsity_warmup_steps=3)
    assert [sparsity_warmup(one, step, 100) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_random_prefixes_follow_the_pareto_law():
    """P(width <= w) = sqrt(w / F) for power 0.5: half of the draws are below F/4, a tenth below F/100."""
    one = spec(random_prefixes=2, prefix_power=0.5)
    width = 10_000
    draws = [random_prefix_widths(one, width, 0, step) for step in range(2000)]
    assert all(len(draw) == 2 and draw[-1] == width for draw in draws)
    for share, expected in ((0.25, 0.5), (0.1, math.sqrt(0.1)), (0.01, 0.1)):
        observed = sum(draw[0] <= share * width for draw in draws) / len(draws)
        assert observed == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(draws)))


def test_random_prefixes_increase_and_depend_on_seed_and_step_alone():
    one = spec(random_prefixes=10, min_prefix=8)
    draw = random_prefix_widths(one, 500, 3, 17)
    assert draw == random_prefix_widths(one, 500, 3, 17)
    assert draw != random_prefix_widths(one, 500, 3, 18)
    assert draw == sorted(set(draw)) and len(draw) == 10 and draw[0] >= 8 and draw[-1] == 500


def test_more_random_prefixes_than_latents_are_all_of_them():
    assert random_prefix_widths(spec(random_prefixes=10), 4, 0, 0) == [1, 2, 3, 4]
