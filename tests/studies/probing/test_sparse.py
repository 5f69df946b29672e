"""k-sparse probes on planted latents, and their scores against scikit-learn's."""

import pytest
import torch

from hf_matryoshka_sae.studies.probing.columns import LatentColumns
from hf_matryoshka_sae.studies.probing.sparse import SCORES, classifier_scores, dense_probes, sparse_probes


sklearn = pytest.importorskip("sklearn")


@pytest.fixture
def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents 2 and 6 are halves of the first task, latent 4 is the second; the rest is noise."""
    targets = torch.rand(400, 2) < torch.tensor([0.5, 0.1])
    half = torch.rand(400) < 0.5
    x = torch.rand(400, 8) * (torch.rand(400, 8) < 0.2)
    x[:, 2], x[:, 6], x[:, 4] = targets[:, 0] & half, targets[:, 0] & ~half, targets[:, 1] * 2.0
    return x, targets, torch.arange(400) % 4 == 0


def test_planted_latents_are_found(planted):
    x, targets, test = planted
    scores = sparse_probes(LatentColumns.of_dense(x), targets, test, [4, 8], [1, 2, 5])
    assert scores.shape == (2, 3, 2, len(SCORES))
    accuracy = scores[..., 0]
    assert accuracy[1, 1, 0] == accuracy[1, 0, 1] == 1  # two latents for the first task, one for the second
    assert (scores[1, 1, 0] == 1).all()
    assert 0.65 < accuracy[1, 0, 0] < 0.9  # half of the first task
    assert accuracy[0, 0, 1] < 0.7  # latent 4 is not among the first 4


def test_a_prefix_is_the_dictionary_cut(planted):
    x, targets, test = planted
    both = sparse_probes(LatentColumns.of_dense(x), targets, test, [3, 8], [1, 5])
    assert torch.equal(both[:1], sparse_probes(LatentColumns.of_dense(x[:, :3]), targets, test, [3], [1, 5]))


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

    target = torch.rand(200) < 0.2
    log_odds = (torch.randn(200) + target).mul(3).round() / 3  # with ties
    weights = torch.where(target, 1 / target.sum(), 1 / (~target).sum()).numpy()
    accuracy, f1, auc = classifier_scores(log_odds, target).tolist()
    assert accuracy == pytest.approx(balanced_accuracy_score(target.numpy(), log_odds.numpy() > 0))
    assert f1 == pytest.approx(f1_score(target.numpy(), log_odds.numpy() > 0, sample_weight=weights), rel=1e-5)
    assert auc == pytest.approx(roc_auc_score(target.numpy(), log_odds.numpy()))


def test_a_dense_probe_is_not_held_back_by_its_ridge(planted):
    _, _, test = planted
    x = torch.randn(400, 20)
    targets = torch.stack([x[:, 0] > 0, torch.rand(400) < 0.5], 1)
    scores = dense_probes(1e-3 * x + 5, targets, test, ~test & (torch.arange(400) % 4 == 1))
    assert classifier_scores(scores[test, 0], targets[test, 0])[0] > 0.9
    assert scores[test, 1].abs().mean() < 0.5  # nothing to be learnt: a strong ridge is chosen
