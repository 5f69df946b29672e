"""Correlations of similarity matrices against scipy, the bootstrap against explicit resamples, samples of tokens."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import pearsonr, spearmanr

from hf_matryoshka_sae.evaluation.similarity import TokenSample, checked_batches, representational_similarity


N, D = 40, 6


def _states(noise=(0.3, 3.0)):
    x = torch.randn(N, D) + 0.5
    return x, torch.stack([x + scale * torch.randn(N, D) for scale in noise])


@pytest.mark.parametrize("centre", [False, True])
def test_scores_are_scipys_correlations_of_the_upper_triangles(centre):
    x, reconstructions = _states()
    found = representational_similarity(x, reconstructions, centre)
    for row, y in zip(found, reconstructions, strict=True):
        parts = x.double(), y.double()
        similar = [1 - pdist(part - part.mean(0) if centre else part, "cosine") for part in parts]
        assert row["spearman"] == pytest.approx(spearmanr(*similar).statistic, abs=1e-12)
        assert row["pearson"] == pytest.approx(pearsonr(*similar).statistic, abs=1e-12)
        assert (row["tokens"], row["pairs"], row["centred"]) == (N, N * (N - 1) // 2, centre)
    assert found[0]["spearman"] > found[1]["spearman"] + 0.1


def test_ties_share_their_rank_as_in_scipy():
    x = torch.eye(3)[torch.randint(0, 3, (N,))] + torch.eye(3)[torch.randint(0, 3, (N,))]
    y = (x + torch.eye(3)[torch.randint(0, 3, (N,))])[None]
    similar = [(1 - pdist(part.double().numpy(), "cosine")).round(12) for part in (x, y[0])]
    assert representational_similarity(x, y)[0]["spearman"] == pytest.approx(spearmanr(*similar).statistic, abs=1e-12)


def test_the_identity_scores_1_and_rotation_and_scale_change_nothing():
    x, reconstructions = _states()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    same = representational_similarity(x, torch.stack([x, 3 * x]))
    for row in same:
        assert row["spearman"] == pytest.approx(1, abs=1e-12)
        assert row["spearman_interval"] == pytest.approx([1, 1], abs=1e-12)
    turned = representational_similarity(x.double() @ rotation, reconstructions * 2)
    for before, after in zip(representational_similarity(x, reconstructions), turned, strict=True):
        assert after["spearman"] == pytest.approx(before["spearman"], abs=1e-9)


def test_the_bootstrap_equals_explicit_resamples_without_pairs_of_a_token_with_itself():
    x, reconstructions = _states((1.0,))
    row = representational_similarity(x, reconstructions, resamples=30, seed=5)[0]
    ranks = []
    for part in (x, reconstructions[0]):
        cosines = torch.corrcoef(torch.cat([part, -part], 1).double())  # uncentred: rows of mean 0
        upper = torch.triu_indices(N, N, 1)
        order = cosines[upper[0], upper[1]].argsort().argsort().double() + 1
        ranks.append(torch.zeros(N, N, dtype=torch.float64).index_put((upper[0], upper[1]), order))
        ranks[-1] += ranks[-1].T.clone()
    drawn = np.random.default_rng(5).multinomial(N, np.full(N, 1 / N), size=30)
    scores = []
    for counts in drawn:
        tokens = np.repeat(np.arange(N), counts)
        pairs = [(a, b) for i, a in enumerate(tokens) for b in tokens[i + 1 :] if a != b]
        left, right = ([matrix[a, b].item() for a, b in pairs] for matrix in ranks)
        scores.append(pearsonr(left, right).statistic)
    assert row["spearman_interval"] == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist(), abs=1e-10)


def test_the_interval_covers_the_score_of_many_tokens():
    def draw(count):
        x = torch.randn(count, D)
        return x, (x + torch.randn(count, D))[None]

    torch.manual_seed(3)
    (truth,) = representational_similarity(*draw(1500), resamples=0)
    assert truth["spearman_interval"] is None
    covered = 0
    for seed in range(20):
        low, high = representational_similarity(*draw(60), seed=seed)[0]["spearman_interval"]
        covered += low <= truth["spearman"] <= high
    assert covered >= 16


def test_equal_reconstructions_have_no_score():
    x, reconstructions = _states()
    reconstructions[0] = torch.randn(D)
    reconstructions[1] = 0
    for row in representational_similarity(x, reconstructions):
        assert row["spearman"] is row["pearson"] is row["spearman_interval"] is None


def test_wrong_input_is_named():
    x, reconstructions = _states()
    with pytest.raises(ValueError, match=r"reconstructions \(P, N, D\)"):
        representational_similarity(x, reconstructions[0])
    with pytest.raises(ValueError, match="at least 3 tokens"):
        representational_similarity(x[:2], reconstructions[:, :2])
    with pytest.raises(ValueError, match="finite"):
        representational_similarity(x, reconstructions * torch.nan)
    with pytest.raises(ValueError, match=r"\(n, 6\); batch 1 has shape \(4, 5\)"):
        list(checked_batches([x, torch.randn(4, 5)]))
    with pytest.raises(ValueError, match="batch 0 holds NaN"):
        list(checked_batches([x / 0]))
    with pytest.raises(ValueError, match="empty"):
        TokenSample.of([], 4).tokens()
    with pytest.raises(ValueError, match="at least 1 token"):
        TokenSample(0)


def reference_keys(x, seed):
    """The keys of rows by Python's integers."""
    keys, mask = [], 2**64 - 1
    multipliers = np.random.default_rng(seed).integers(-(2**63), 2**63, x.shape[1] + 1, dtype=np.int64)
    offset, *multipliers = (int(number) | 1 for number in multipliers)
    for row in x.numpy().astype(np.float32):
        z = (offset + sum(int(bits) * m for bits, m in zip(row.view(np.int32), multipliers, strict=True))) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        keys.append(z - 2**64 if z >> 63 else z)
    return keys


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_the_same_tokens_are_sampled_whatever_the_batches_and_their_order(batch):
    x = torch.randn(500, 3)
    whole = TokenSample.of(x, 50, seed=1)
    order = np.argsort(reference_keys(x, 1))
    assert torch.equal(whole.tokens(), x[torch.from_numpy(order[:50])])
    assert torch.equal(TokenSample.of(x.split(batch)[::-1], 50, seed=1).tokens(), whole.tokens())
    assert torch.equal(TokenSample.of(x.double(), 50, seed=1).tokens().float(), whole.tokens())
    assert whole.seen == 500
    assert not torch.equal(whole.tokens(), TokenSample.of(x, 50, seed=2).tokens())
    assert torch.equal(TokenSample.of(x, 600, seed=1).tokens(), x[torch.from_numpy(order)])


def test_equal_tokens_are_kept_together_and_zero_has_one_sign():
    x = torch.randn(30, 2)[torch.arange(30).repeat(2)]
    x[[0, 30], 0] = torch.tensor([0.0, -0.0])
    rows = TokenSample.of(x, 10).tokens()
    assert torch.equal(rows[::2], rows[1::2])
    assert len(TokenSample.of(torch.ones(9, 2), 4).tokens()) == 4


def test_every_token_is_as_likely():
    x = torch.arange(20.0)[:, None]
    counts = torch.zeros(20)
    for seed in range(1000):
        counts[TokenSample.of(x.split(6), 5, seed).tokens()[:, 0].long()] += 1
    assert counts.sub(250).abs().max() < 5 * (1000 * 0.25 * 0.75) ** 0.5


def _one_of_two(rank: int, rows: torch.Tensor) -> torch.Tensor:
    share = rows[:7] if rank else rows[7:]  # one process has fewer than are asked for
    return TokenSample.of(share.split(9), 20).tokens()


def test_two_processes_sample_what_one_does(two_processes):
    rows = torch.randn(60, 2)
    alone = TokenSample.of(rows, 20).tokens()
    for found in two_processes.run(_one_of_two, rows):
        assert torch.equal(found, alone)
    assert any((row == rows[:7]).all(1).any() for row in alone)
