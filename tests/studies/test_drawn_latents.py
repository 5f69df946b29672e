"""Rows of widths from scores of drawn latents, against sums written out."""

import numpy as np
import pytest

from hf_matryoshka_sae.studies.drawn_latents import DrawnLatents


def test_groups_count_as_much_as_they_have_eligible_latents():
    eligible = np.zeros(80, dtype=bool)
    eligible[[*range(0, 20, 2), *range(40, 70)]] = True
    drawn = DrawnLatents.of(eligible, [20, 40, 80], per_group=8, seed=3)
    assert drawn.eligible == [10, 0, 30] and [len(group) for group in drawn.groups] == [8, 0, 8]
    assert set(drawn.groups[0]) <= set(range(0, 20, 2)) and set(drawn.groups[2]) <= set(range(40, 70))
    assert sum(drawn.weights.values()) == pytest.approx(40) and drawn.weights[drawn.groups[2][0]] == 30 / 8
    values = {latent: [float(latent), 1.0] for latent in drawn.latents}
    rows = drawn.rows(values, ["score", "one"], resamples=2000, seed=0)
    first, last = np.mean(drawn.groups[0]), np.mean(drawn.groups[2])
    assert [row["score"] for row in rows] == pytest.approx([first, first, (10 * first + 30 * last) / 40])
    assert [row["latents"] for row in rows] == [8, 8, 16]
    assert [row["explainable"] for row in rows] == pytest.approx([10 / 20, 10 / 40, 40 / 80])
    for row in rows:
        assert row["score_interval"][0] <= row["score"] <= row["score_interval"][1]
        assert row["one_interval"] == pytest.approx([1, 1])
    # The mean of n drawn latents spreads by their standard deviation / sqrt(n).
    half = 1.96 * np.std(drawn.groups[0]) / 8**0.5
    assert rows[0]["score_interval"] == pytest.approx([first - half, first + half], rel=0.15)


def test_a_width_without_eligible_latents_has_zeros_and_no_interval():
    drawn = DrawnLatents.of(np.array([False, False, True]), [2, 3], per_group=4, seed=0)
    rows = drawn.rows({2: [0.7]}, ["score"], resamples=10, seed=0)
    assert rows[0]["score"] == 0 and rows[0]["score_interval"] is None and rows[0]["explainable"] == 0
    assert rows[1]["score"] == pytest.approx(0.7) and rows[1]["latents"] == 1


def test_no_interval_is_drawn_over_fewer_than_eight_latents():
    def intervals(eligible: list[int], per_group: int) -> list[bool]:
        there = np.zeros(60, dtype=bool)
        for group, count in enumerate(eligible):
            there[30 * group : 30 * group + count] = True
        drawn = DrawnLatents.of(there, [30, 60], per_group, seed=0)
        rows = drawn.rows({latent: [1.0] for latent in drawn.latents}, ["score"], 20, 0)
        return [row["score_interval"] is not None for row in rows]

    assert intervals([30, 30], 7) == [False, False]
    assert intervals([30, 30], 8) == [True, True]
    assert intervals([3, 30], 8) == [False, True]  # all three of the first group are drawn: nothing is estimated there
    assert intervals([3, 4], 8) == [False, False]
