"""Probes on single latents against minimisers of the written-out loss, and sparse sums against dense ones."""

import numpy as np
import pytest
import torch
from scipy.optimize import root
from scipy.special import expit

from hf_matryoshka_sae.studies.probing import newton as probe_newton
from hf_matryoshka_sae.studies.probing.columns import LatentColumns, PairCollector
from hf_matryoshka_sae.studies.probing.newton import class_weights, cross_entropy, fit_probes


RIDGE = 1e-3


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents that are rare, dense, constant, silent, separating (by value, by firing), and of huge and tiny units."""
    targets = torch.rand(90, 3) < torch.tensor([0.5, 0.2, 0.05])
    targets[:2] = torch.tensor([[True], [False]])
    x = torch.rand(90, 9, dtype=torch.float64) * (torch.rand(90, 9) < 0.25)
    x[:, 1] = torch.randn(90) * 2 + targets[:, 0] + 3
    x[:, 2] = 0.7
    x[:, 3] = 0
    x[:, 4] = targets[:, 1] + 0.1
    x[:, 5] = targets[:, 2]
    x[:, 6] *= 1e5
    x[:, 7] *= -1e-5
    return x, targets


def objective(wb: np.ndarray, a: np.ndarray, y: np.ndarray, c: np.ndarray, ridge: float) -> float:
    m = wb[0] * a + wb[1]
    return float((c * (np.logaddexp(0, m) - y * m)).sum() + ridge / 2 * wb[0] ** 2)


def gradient(wb: np.ndarray, a: np.ndarray, y: np.ndarray, c: np.ndarray, ridge: float) -> np.ndarray:
    residual = c * (expit(wb[0] * a + wb[1]) - y)
    return np.array([residual @ a + ridge * wb[0], residual.sum()])


def jacobian(wb: np.ndarray, a: np.ndarray, y: np.ndarray, c: np.ndarray, ridge: float) -> np.ndarray:
    p = expit(wb[0] * a + wb[1])
    curvature = c * p * (1 - p)
    mixed = curvature @ a
    return np.array([[curvature @ a**2 + ridge, mixed], [mixed, curvature.sum()]])


def test_every_probe_minimises_the_written_loss(problem):
    x, targets = problem
    weights = class_weights(targets)
    probes = fit_probes(LatentColumns.of_dense(x), targets, weights, RIDGE)
    scale = x.square().mean(0).sqrt()
    for i in range(x.shape[1]):
        unit = (x[:, i] / (scale[i] if scale[i] else 1)).numpy()
        for t in range(targets.shape[1]):
            given = (unit, targets[:, t].double().numpy(), weights[:, t].numpy(), RIDGE)
            # Convex, so its minimum is where its gradient vanishes, which is found to more digits than by values.
            best = root(gradient, np.zeros(2), given, jac=jacobian, tol=1e-14)
            assert np.abs(gradient(best.x, *given)).max() < 1e-10
            found = np.array([probes.weight[i, t] * (scale[i] if scale[i] else 1), probes.bias[i, t]])
            np.testing.assert_allclose(found, best.x, atol=1e-5)
            assert objective(found, *given) <= objective(best.x, *given) + 1e-12
            assert probes.loss[i, t].item() == pytest.approx(objective(found, *given[:3], 0.0), abs=1e-9)


def test_probes_are_those_of_scikit_learn(problem):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, targets = problem
    probes = fit_probes(LatentColumns.of_dense(x), targets, class_weights(targets), 1 / len(x))
    for i in (0, 1, 2, 4, 5, 8):
        scale = x[:, i].square().mean().sqrt()
        unit = (x[:, i : i + 1] / scale).numpy()
        for t in range(3):
            model = linear_model.LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=1000)
            model.fit(unit, targets[:, t].numpy())
            assert (probes.weight[i, t] * scale).item() == pytest.approx(model.coef_[0, 0], abs=1e-5)
            assert probes.bias[i, t].item() == pytest.approx(model.intercept_[0], abs=1e-5)


def test_a_silent_or_constant_latent_knows_nothing_and_a_separating_one_all(problem):
    x, targets = problem
    probes = fit_probes(LatentColumns.of_dense(x), targets, class_weights(targets), 1e-5)
    torch.testing.assert_close(probes.loss[2:4], torch.full((2, 3), 2.0, dtype=torch.float64).log(), atol=1e-6, rtol=0)
    assert not probes.weight[3].any()
    assert probes.loss[4, 1] < 0.002 and probes.loss[5, 2] < 0.002


def test_blocks_and_starts_do_not_matter(problem, monkeypatch):
    x, targets = problem
    columns, weights = LatentColumns.of_dense(x), class_weights(targets)
    whole = fit_probes(columns, targets, weights, RIDGE)
    far = probe_newton.Probes(3 * whole.weight, whole.bias - 2, whole.loss)
    done = []
    monkeypatch.setattr(probe_newton, "_ENTRIES_AT_ONCE", 50)
    others = [
        fit_probes(columns, targets, weights, RIDGE, progress=done.append),
        fit_probes(columns, targets, weights, RIDGE, start=far),
    ]
    assert sum(done) == x.shape[1] and len(done) > 2
    for other in others:
        torch.testing.assert_close(other.loss, whole.loss, atol=1e-7, rtol=0)
        torch.testing.assert_close(other.bias, whole.bias, atol=2e-5, rtol=1e-5)


def test_a_part_is_as_if_there_were_nothing_else(problem):
    x, targets = problem
    part = torch.arange(90) % 3 > 0
    part[:2] = True
    of_part = fit_probes(LatentColumns.of_dense(x).among(part), targets, class_weights(targets, part), RIDGE)
    alone = fit_probes(LatentColumns.of_dense(x[part]), targets[part], class_weights(targets[part]), RIDGE)
    torch.testing.assert_close(of_part.weight, alone.weight)
    torch.testing.assert_close(of_part.loss, alone.loss)


def test_columns_are_the_matrix_they_were_made_of(problem):
    x = problem[0].float()
    columns = LatentColumns.of_dense(x)
    order = torch.randperm(len(columns.rows))
    shuffled = LatentColumns.of_pairs(columns.rows[order], columns.cols[order], columns.values[order], *x.shape)
    for name in ("rows", "values", "offsets"):
        assert torch.equal(getattr(shuffled, name), getattr(columns, name))
    some = torch.tensor([8, 3, 0, 8])
    assert torch.equal(columns.dense(some), x[:, some])
    assert torch.equal(columns.select(some).dense(torch.arange(4)), x[:, some])
    per_row = torch.randn(90, 2, dtype=torch.float64)
    torch.testing.assert_close(columns.sums(per_row), x.double().T @ per_row)
    part = torch.rand(90) < 0.5
    assert torch.equal(columns.among(part).dense(torch.arange(9)), x * part[:, None])


def test_each_class_weighs_one_half():
    targets = torch.tensor([[True, False], [False, True], [False, True], [False, True]])
    weights = class_weights(targets)
    torch.testing.assert_close((weights * targets).sum(0), torch.full((2,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(0), torch.ones(2, dtype=torch.float64))
    nothing = cross_entropy(torch.zeros(4, 2), targets, weights)
    torch.testing.assert_close(nothing, torch.full((2,), 2.0, dtype=torch.float64).log())


def test_more_activations_than_may_be_kept_are_refused():
    collector = PairCollector(4, max_pairs=5)
    for _ in range(2):
        collector.add(torch.arange(3), torch.zeros(3, dtype=torch.long), torch.ones(3))
    with pytest.raises(ValueError, match="6 activations .* raise `max_pairs`"):
        collector.gather(3)


def test_bad_input_is_named(problem):
    x, targets = problem
    columns, weights = LatentColumns.of_dense(x), class_weights(targets)
    with pytest.raises(ValueError, match="bool targets"):
        fit_probes(columns, targets.float(), weights, RIDGE)
    with pytest.raises(ValueError, match=r"\(90, T\)"):
        fit_probes(columns, targets[:80], weights[:80], RIDGE)
    with pytest.raises(ValueError, match="ridge"):
        fit_probes(columns, targets, weights, 0.0)
    with pytest.raises(ValueError, match="both classes"):
        class_weights(torch.ones(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="not finite"):
        PairCollector(4, 5).add(torch.arange(1), torch.arange(1), torch.tensor([torch.nan]))
