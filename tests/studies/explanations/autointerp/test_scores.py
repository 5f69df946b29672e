"""Scores against other implementations."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from hf_matryoshka_sae.studies.explanations.autointerp.scores import agreement, pearson


@pytest.mark.parametrize("seed", range(10))
def test_agreement_counts_hits_and_misses(seed):
    generator = np.random.default_rng(seed)
    said, truth = (generator.integers(0, 2, size=20).astype(bool) for _ in range(2))
    pairs = list(zip(said.tolist(), truth.tolist(), strict=True))
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    balanced, f1, accuracy = agreement(said, truth)
    assert balanced == pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2)
    assert f1 == pytest.approx(2 * tp / (2 * tp + fp + fn)) and accuracy == pytest.approx((tp + tn) / 20)


def test_answers_that_are_all_the_same_say_nothing():
    truth = [True] * 4 + [False] * 10
    assert agreement([False] * 14, truth) == (0.5, 0.0, pytest.approx(10 / 14))
    assert agreement([True] * 14, truth)[0] == 0.5
    assert agreement([True, True], [True, True]) == (0.75, 1.0, 1.0)  # of the other kind nothing is known


@pytest.mark.parametrize("seed", range(10))
def test_pearson_is_scipys(seed):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(2, 50)) * 10.0 ** generator.integers(-6, 6)
    assert pearson(x, y + x) == pytest.approx(pearsonr(x, y + x)[0])


@pytest.mark.parametrize("constant", [np.zeros(7), np.full(7, 0.1), np.full(7, 1e9 / 3)])
def test_a_constant_has_no_correlation(constant):
    assert pearson(constant, np.arange(7)) is None and pearson(np.arange(7), constant) is None
