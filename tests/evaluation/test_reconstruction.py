"""Against sums written out in float64, over all tokens at once."""

import pytest
import torch

from hf_matryoshka_sae.evaluation.reconstruction import ReconstructionSums


P, N, D = 3, 500, 7


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(N, D) * torch.linspace(0.1, 3, D) + 5
    noise = torch.tensor([2.0, 1.0, 0.1])[:, None, None] * torch.randn(P, N, D)
    return x, (x - x.mean(0)) * torch.tensor([0.0, 0.5, 0.95])[:, None, None] + x.mean(0) + noise + 0.3


def _added(x, reconstructions, size=64) -> list[dict[str, float]]:
    sums = ReconstructionSums.zeros(P, D)
    for start in range(0, len(x), size):
        sums.add(x[start : start + size], reconstructions[:, start : start + size])
    return sums.rows()


def test_every_metric_follows_its_equation(data):
    x, reconstructions = (tensor.double() for tensor in data)
    rows = _added(*data)
    for row, out in zip(rows, reconstructions, strict=True):
        r = x - out
        variance = (x - x.mean(0)).square().sum() / N
        batches = list(zip(x.split(64), r.split(64), strict=True))
        expected = {
            "fvu": r.square().sum() / N / variance,
            "explained_variance": 1 - r.square().sum() / N / variance,
            "explained_variance_saebench": 1
            - r.square().sum(1).mean() / (x.square().sum(1).mean() - x.square().mean(0).mean() ** 2),
            "explained_variance_legacy": 1
            - torch.cat([b.square().sum(1) / (a - a.mean(0)).square().sum(1) for a, b in batches]).mean(),
            "explained_variance_dl": torch.stack(
                [1 - b.var(0, correction=0).sum() / a.var(0, correction=0).sum() for a, b in batches]
            ).mean(),
            "mse": r.square().mean(),
            "cossim": torch.cosine_similarity(x, out).mean(),
            "l2_norm_in": x.norm(dim=1).mean(),
            "l2_norm_out": out.norm(dim=1).mean(),
            "l2_ratio": (out.norm(dim=1) / x.norm(dim=1)).mean(),
            "relative_reconstruction_bias": out.square().sum(1).mean() / (x * out).sum(1).mean(),
            "mean_residual_fvu": r.mean(0).square().sum() / variance,
        }
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert row[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name


def test_the_identity_explains_everything(data):
    x, _ = data
    row = _added(x, x.expand(P, N, D))[0]
    assert row["fvu"] == 0 and row["l2_ratio"] == pytest.approx(1) and row["cossim"] == pytest.approx(1)


def test_batches_do_not_matter_where_the_definition_has_none(data):
    small, large = _added(*data, size=17), _added(*data, size=N)
    for a, b in zip(small, large, strict=True):
        for name in a.keys() - {"explained_variance_legacy", "explained_variance_dl"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6), name


def test_large_means_keep_their_variance():
    x = torch.randn(4000, D) * 0.01 + 300  # E||x||^2 - ||E x||^2 has no digit left in float32
    reconstruction = x.mean(0).expand(P, 4000, D)
    sums = ReconstructionSums.zeros(P, D)
    sums.add(x, reconstruction)
    assert sums.rows()[0]["fvu"] == pytest.approx(1, rel=0.02)


def test_sums_add_up(data):
    x, reconstructions = data
    whole, parts = ReconstructionSums.zeros(P, D), ReconstructionSums.zeros(P, D)
    whole.add(x[:128], reconstructions[:, :128])
    whole.add(x[128:], reconstructions[:, 128:])
    other = ReconstructionSums.zeros(P, D)
    parts.add(x[:128], reconstructions[:, :128])
    other.add(x[128:], reconstructions[:, 128:])
    parts.merge(other.to_dict())
    assert parts.rows() == whole.rows()


def test_what_does_not_fit_is_said(data):
    x, reconstructions = data
    sums = ReconstructionSums.zeros(P, D)
    with pytest.raises(ValueError, match=r"reconstructions \(P, N, D\) = \(3, 500, 7\)"):
        sums.add(x, reconstructions[:2])
    with pytest.raises(ValueError, match="not finite"):
        sums.add(x * torch.nan, reconstructions)
    with pytest.raises(ValueError, match="no tokens"):
        sums.rows()
    with pytest.raises(ValueError, match="`cosine` must have shape"):
        sums.merge({**sums.to_dict(), "cosine": [0.0]})


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 0.05])
def test_small_reconstructions_are_measured_exactly(scale):
    """What is left of two large numbers is noise: a reconstruction of nothing has cosine 0, not 1e300."""
    x = torch.randn(50, D) + 3
    out = scale * (x + torch.randn(50, D))
    sums = ReconstructionSums.zeros(1, D)
    sums.add(x, out[None])
    (row,) = sums.rows()
    x, out = x.double(), out.double()
    assert row["l2_norm_out"] == pytest.approx(out.norm(dim=1).mean().item(), rel=1e-5)
    assert row["cossim"] == pytest.approx(torch.cosine_similarity(x, out, eps=0).nan_to_num().mean().item(), rel=1e-5)
    expected = (out.square().sum() / (out * x).sum()).item()
    assert row["relative_reconstruction_bias"] == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_a_batch_of_one_token_counts_as_unexplained_in_the_legacy_definition():
    sums = ReconstructionSums.zeros(1, D)
    for size in (10, 1):
        x = torch.randn(size, D)
        sums.add(x, x[None] + 0.1)
    (row,) = sums.rows()
    assert 0.5 < row["explained_variance_legacy"] < 1 - 1 / 11
