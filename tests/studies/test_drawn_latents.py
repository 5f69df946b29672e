"""Rows of widths from scores of drawn latents, against sums written out."""

import numpy as np
import pytest

from hf_matryoshka_sae.studies.drawn_latents import DrawnLatents


def test_groups_count_as_much_as_they_have_eligible_latents():
    eligible = np.zeros(20, dtype=bool)
    eligible[[0, 1, 4, 9, 10, 11, 12, 13, 19]] = True
    drawn = DrawnLatents.of(eligible, [5, 8, 20], per_group=2, seed=3)
    assert drawn.eligible == [3, 0, 6] and [len(group) for group in drawn.groups] == [2, 0, 2]
    assert set(drawn.groups[0]) <= {0, 1, 4} and set(drawn.groups[2]) <= {9, 10, 11, 12, 13, 19}
    values = {latent: [float(latent), 1.0] for latent in drawn.latents}
    rows = drawn.rows(values, ["score", "one"], resamples=500, seed=0)
    first, last = np.mean(drawn.groups[0]), np.mean(drawn.groups[2])
    assert [row["score"] for row in rows] == pytest.approx([first, first, (3 * first + 6 * last) / 9])
    assert [row["latents"] for row in rows] == [2, 2, 4]
    assert [row["explainable"] for row in rows] == pytest.approx([3 / 5, 3 / 8, 9 / 20])
    for row in rows:
        assert row["score_interval"][0] <= row["score"] <= row["score_interval"][1]
        assert row["one_interval"] == pytest.approx([1, 1])
    # Two values a and b drawn twice: their mean is a, b, or (a + b) / 2, each half of the time or a quarter.
    assert rows[0]["score_interval"] == pytest.approx(sorted(map(float, drawn.groups[0])))


def test_a_width_without_eligible_latents_has_zeros():
    drawn = DrawnLatents.of(np.array([False, False, True]), [2, 3], per_group=4, seed=0)
    rows = drawn.rows({2: [0.7]}, ["score"], resamples=10, seed=0)
    assert rows[0]["score"] == 0 and rows[0]["score_interval"] == [0, 0] and rows[0]["explainable"] == 0
    assert rows[1]["score"] == pytest.approx(0.7) and rows[1]["latents"] == 1


def test_one_latent_of_many_says_nothing_of_how_much_they_differ():
    eligible = np.ones(6, dtype=bool)
    eligible[1:3] = False  # of the first group one alone is eligible, and drawn
    drawn = DrawnLatents.of(eligible, [3, 6], per_group=2, seed=0)
    values = {latent: [float(latent)] for latent in drawn.latents}
    first, both = drawn.rows(values, ["score"], 50, 0)
    assert first["score_interval"] == [0.0, 0.0] and both["score_interval"] is not None
    single = DrawnLatents.of(np.ones(6, dtype=bool), [3, 6], per_group=1, seed=0)
    for row in single.rows({latent: [1.0] for latent in single.latents}, ["score"], 50, 0):
        assert row["score"] == 1.0 and row["score_interval"] is None
