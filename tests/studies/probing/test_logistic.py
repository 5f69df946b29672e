"""Probes against minimisers of the written-out losses, and planted classes."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from hf_matryoshka_sae.models.sparse_ops import LatentPairs, PairIndex
from hf_matryoshka_sae.studies.probing.logistic import f1_scores, fit_logistic, main_latents, rank_latents


def pairs(dense: torch.Tensor) -> LatentPairs:
    rows, cols = dense.nonzero(as_tuple=True)
    return LatentPairs(PairIndex(rows, cols, *dense.shape), dense[rows, cols])


def log_loss(w: np.ndarray, b: float, x: np.ndarray, y: np.ndarray) -> float:
    """The balanced log loss of one class, summed over words."""
    margins = np.where(y, 1, -1) * (x @ w + b)
    weights = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    return float((weights * np.logaddexp(0, -margins)).sum())


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(120, 5) * torch.tensor([3.0, 1.0, 0.5, 1.0, 2.0]) + 4
    noisy = x[:, :3] + torch.randn(120, 3)
    return x, noisy > torch.tensor([6.0, 4.0, 4.5])


def test_probe_minimises_the_written_loss(problem):
    x, targets = problem
    probe = fit_logistic(x, targets, l2=0.7)
    z = x.double().numpy()
    z = (z - z.mean(0)) / np.sqrt(((z - z.mean(0)) ** 2).mean())
    for c in range(3):
        y = targets[:, c].numpy()

        def loss(wb: np.ndarray, y: np.ndarray = y) -> float:
            return log_loss(wb[:-1], wb[-1], z, y) + 0.35 * (wb[:-1] ** 2).sum()

        best = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-7}).x
        np.testing.assert_allclose(probe.scores(x)[:, c].numpy(), z @ best[:-1] + best[-1], atol=1e-4)


@pytest.mark.parametrize("l2", [1.0, 100.0])
def test_probe_on_inputs_as_they_are_is_scikit_learn_s(problem, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, targets = problem
    x = torch.cat([x * torch.tensor([1e-2, 30.0, 1.0, 1.0, 1.0]), torch.zeros(120, 1)], 1)
    scores = fit_logistic(x, targets, l2, own_units=True).scores(x)
    for c in range(3):
        right = linear_model.LogisticRegression(C=1 / l2, class_weight="balanced", solver="newton-cholesky", tol=1e-10)
        expected = right.fit(x.double().numpy(), targets[:, c].numpy()).decision_function(x.double().numpy())
        np.testing.assert_allclose(scores[:, c].numpy(), expected, atol=1e-5)


def test_neither_units_nor_rotation_matter(problem):
    x, targets = problem
    x = x.double()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    expected = fit_logistic(x, targets).scores(x)
    for other in (1e-3 * x, x @ rotation, x + 100):
        torch.testing.assert_close(fit_logistic(other, targets).scores(other), expected, atol=1e-5, rtol=1e-5)


def test_inputs_that_tell_nothing_give_even_odds():
    targets = torch.arange(33)[:, None] % 3 == 0
    for same in (torch.zeros(33, 2), torch.full((33, 2), 0.7, dtype=torch.float64)):
        scores = fit_logistic(same, targets).scores(same)
        torch.testing.assert_close(scores, torch.zeros(33, 1, dtype=torch.float64))


def test_f1():
    predicted = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    targets = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
    # Class 0: precision 2/3, recall 2/3.
    torch.testing.assert_close(f1_scores(predicted, targets), torch.tensor([2 / 3, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "targets", "message"),
    [
        (torch.randn(4, 2), torch.zeros(4, 1), "bool"),
        (torch.randn(4, 2), torch.zeros(3, 1, dtype=torch.bool), r"\(4, C\)"),
        (torch.randn(4, 2), torch.zeros(4, 1, dtype=torch.bool), "members"),
        (torch.full((2, 2), torch.nan), torch.tensor([[True], [False]]), "finite"),
    ],
)
def test_bad_input_is_named(x, targets, message):
    with pytest.raises(ValueError, match=message):
        fit_logistic(x, targets)


def test_ranking_is_that_of_the_l1_optimum():
    dense = torch.rand(80, 7, dtype=torch.float64) * (torch.rand(80, 7) < 0.3)
    y = (dense @ torch.tensor([2.0, 1.2, 0.5, -1, 0, 0, 0.2], dtype=torch.float64) + 0.3 * torch.randn(80)) > 0.4
    ranked = rank_latents(pairs(dense), y[:, None], k=7, l1=0.01)[0]

    x = (dense / dense.square().mean(0).sqrt()).numpy()

    def loss(split: np.ndarray) -> float:
        up, down, b = split[:7], split[7:14], split[14]
        return log_loss(up - down, b, x, y.numpy()) / 80 + 0.01 * split[:14].sum()

    bounds = [(0, None)] * 14 + [(None, None)]
    best = minimize(loss, np.zeros(15), method="L-BFGS-B", bounds=bounds, options={"maxfun": 100_000, "ftol": 1e-14})
    weights = best.x[:7] - best.x[7:14]
    expected = [i for i in np.argsort(-weights) if weights[i] > 1e-5]
    assert len(expected) >= 3
    assert ranked.tolist() == expected


def test_ranking_does_not_depend_on_units():
    dense = torch.rand(80, 6) * (torch.rand(80, 6) < 0.3)
    y = (dense[:, :2].sum(1) > 0.3)[:, None]
    expected = rank_latents(pairs(dense), y)[0]
    scaled = rank_latents(pairs(dense * torch.tensor([1e3, 1, 1e-3, 10, 1, 1])), y)[0]
    assert len(expected) and scaled.tolist() == expected.tolist()


def test_latents_that_speak_against_a_class_are_not_listed():
    y = torch.arange(40) % 4 == 0
    dense = torch.stack([(~y).float(), torch.zeros(40)], dim=1)
    assert rank_latents(pairs(dense), y[:, None])[0].tolist() == []
    assert rank_latents(pairs(torch.zeros(40, 2)), y[:, None])[0].tolist() == []


def test_a_class_is_split_among_as_many_latents_as_raise_f1():
    y = torch.arange(120) % 4 == 0
    kind = torch.arange(120) // 4 % 10
    whole = y.float()
    most, some, rare = (y & (kind < 6)).float(), (y & (kind >= 6)).float(), (y & (kind == 9)).float()
    noise = (torch.rand(120) < 0.3).float()

    def main(*columns: torch.Tensor) -> list[int]:
        latents = pairs(torch.stack(columns, dim=1))
        ranked = rank_latents(latents, y[:, None])[0]
        chosen, curve = main_latents(ranked, latents, y, latents, y)
        assert len(curve) - len(chosen) in (0, 1)
        return sorted(chosen.tolist())

    assert main(noise, whole, rare) == [1]
    assert main(noise, most, some) == [1, 2]
