"""The share of latents that hardly ever fire is about the same whatever the number of tokens."""

import numpy as np
import pytest

from hf_matryoshka_sae.evaluation.firing import rare_share


def rates(dead: float, size: int = 4000) -> np.ndarray:
    """Rates whose logarithms are normal, with a width of 1 below the middle and of 0.5 above it."""
    generator = np.random.default_rng(0)
    below = generator.random(size) < 1 / 1.5
    sizes = np.abs(generator.normal(size=size))
    drawn = 10 ** np.minimum(np.where(below, -2.5 - sizes, -2.5 + 0.5 * sizes), -0.3)
    drawn[: round(dead * size)] = 0
    return drawn


@pytest.mark.parametrize("dead", [0.0, 0.1])
def test_the_share_is_the_same_of_few_tokens_and_of_many(dead):
    rate = rates(dead)
    true = (rate < 1e-6).mean()
    never = []
    for tokens in (4_000, 60_000, 1_000_000):
        fired = np.random.default_rng(tokens).poisson(rate * tokens)
        never.append((fired == 0).mean())
        share, (low, high) = rare_share(fired, tokens)
        assert low <= share <= high and low - 0.005 <= true <= high + 0.005
        assert abs(share - true) < (0.01 if tokens > 10_000 else 0.08)
    assert never[0] - never[2] > 0.1  # the plain share is a matter of how many tokens were looked at


def test_all_dead_and_none_dead():
    assert rare_share(np.zeros(100, dtype=int), 10**7)[0] > 0.95
    assert rare_share(np.full(100, 500), 10_000)[0] < 0.001
    assert rare_share(np.array([3, 4]), 1000)[1] is None
