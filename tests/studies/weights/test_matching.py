"""Correlations against numpy's on dense activations; matched rows against planted permutations."""

import itertools

import numpy as np
import pytest
import torch

from hf_matryoshka_sae import BatchTopKSAEConfig, MatryoshkaSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.studies.weights import matching
from hf_matryoshka_sae.studies.weights.matching import (
    CorrelationSums,
    decoder_matching,
    matched_cosine,
    maximum_mean_correlation,
)


D, F, WIDTHS = 6, 17, [3, 8, 17]


def _sae(config):
    sae = build_sae(config).eval().double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn_like(sae.W_enc))
        sae.W_dec.copy_(torch.randn_like(sae.W_dec))
    return sae


@pytest.fixture
def saes():
    sae = _sae(MatryoshkaSAEConfig(d_in=D, num_latents=F, prefix_widths=WIDTHS, activation="topk", k=3))
    references = [
        _sae(TopKSAEConfig(d_in=D, num_latents=5, k=2)),
        _sae(BatchTopKSAEConfig(d_in=D, num_latents=9, k=2)),
    ]
    references[1].threshold.fill_(1.0)
    with torch.no_grad():
        sae.b_enc[1] = -1e3  # dead, in the first prefix
        references[0].b_enc[4] = -1e3
    return sae, references


def _reference(sae, references, x, width):
    """The largest correlations, dead latents left out, from numpy's matrix of all."""
    acts = sae.encode(x).to_dense()[:, :width].detach().numpy()
    acts = acts[:, acts.std(0) > 0]
    found = []
    for reference in references:
        others = reference.encode(x).to_dense().detach().numpy()
        others = others[:, others.std(0) > 0]
        found.append(np.corrcoef(acts.T, others.T)[: acts.shape[1], acts.shape[1] :].max(0))
    return found


@pytest.mark.parametrize("entries", [2**23, 40])
def test_mmc_of_every_prefix_equals_numpys(saes, way, monkeypatch, entries):
    monkeypatch.setattr(matching, "_BLOCK_ENTRIES", entries)
    sae, references = saes
    x = torch.randn(200, D, dtype=torch.float64)
    rows = maximum_mean_correlation(sae, references, x.split(64))
    assert [row["width"] for row in rows] == WIDTHS
    for row in rows:
        expected = _reference(sae, references, x, row["width"])
        assert row["mmc"] == pytest.approx(np.concatenate(expected).mean(), abs=1e-9)
        assert row["mmc_per_reference"] == pytest.approx([part.mean() for part in expected], abs=1e-9)
        assert row["reference_latents"] == 4 + 9
        assert row["tokens"] == 200


def test_an_sae_correlates_fully_with_itself_in_any_order_and_at_any_scale(saes):
    sae, _ = saes
    x = torch.randn(300, D, dtype=torch.float64)
    other = sae.truncate(F)
    other.permute_(torch.randperm(F))
    with torch.no_grad():
        other.W_enc.mul_(2)
        other.b_enc.mul_(2)
    rows = maximum_mean_correlation(sae, other, x)
    assert rows[-1]["mmc"] == pytest.approx(1, abs=1e-9)
    assert rows[0]["mmc"] < rows[1]["mmc"] < 0.99


def test_sums_over_shares_add_up_to_those_of_the_whole(saes):
    sae, references = saes
    x = torch.randn(90, D, dtype=torch.float64)
    whole, first, second = (CorrelationSums(sae, references) for _ in range(3))
    whole.add(x)
    first.add(x[:31])
    second.add(x[31:])
    for name in ("products", "moments", "other_moments", "tokens"):
        total = getattr(first, name) + getattr(second, name)
        assert torch.allclose(total, getattr(whole, name), rtol=1e-12)


def test_a_prefix_without_live_latents_has_no_mmc(saes):
    sae, references = saes
    with torch.no_grad():
        sae.b_enc[:3] = -1e3
    rows = maximum_mean_correlation(sae, references, torch.randn(50, D, dtype=torch.float64))
    assert rows[0]["mmc"] is None and rows[0]["mmc_per_reference"] == [None, None]
    assert rows[1]["mmc"] is not None


def test_matched_rows_find_a_planted_permutation():
    rows = torch.randn(12, D)
    order = torch.randperm(12)
    others = rows[order] * (torch.rand(12, 1) + 0.2)
    for limit, method in ((12, "hungarian"), (11, "max")):
        found = matched_cosine(rows, others, limit)
        assert found == {"matched_cosine": pytest.approx(1, abs=1e-6), "method": method, "pairs": 12}


def test_one_to_one_matching_is_the_best_of_all_and_max_is_its_upper_bound():
    rows, others = torch.randn(6, 3).double(), torch.randn(4, 3).double()
    cosines = np.array([[torch.cosine_similarity(a, b, dim=0).item() for b in others] for a in rows])
    best = max(np.mean([cosines[i, j] for j, i in enumerate(p)]) for p in itertools.permutations(range(6), 4))
    found, bound = matched_cosine(rows, others), matched_cosine(rows, others, hungarian_limit=1)
    assert found["matched_cosine"] == pytest.approx(best)
    assert bound["matched_cosine"] == pytest.approx(cosines.max(0).mean())
    assert found["matched_cosine"] <= bound["matched_cosine"]
    with_zeros = matched_cosine(torch.cat([rows, torch.zeros(2, 3)]), others)
    assert with_zeros == found


def test_prefixes_of_two_saes_are_matched(saes):
    sae, references = saes
    rows = decoder_matching(sae, references[1])
    assert [row["pairs"] for row in rows] == [3, 8, 9]
    other = sae.truncate(F)
    other.permute_(torch.cat([torch.randperm(8), torch.arange(8, F)]))
    rows = decoder_matching(sae, other)
    assert rows[0]["matched_cosine"] < 0.999
    assert rows[1]["matched_cosine"] == pytest.approx(1) == rows[2]["matched_cosine"]


def test_wrong_input_is_named(saes):
    sae, references = saes
    x = torch.randn(5, D)
    with pytest.raises(ValueError, match="no reference"):
        maximum_mean_correlation(sae, [], x)
    with pytest.raises(ValueError, match="a reference of 4"):
        maximum_mean_correlation(sae, _sae(TopKSAEConfig(d_in=4, num_latents=5, k=2)), x)
    with pytest.raises(ValueError, match="17 latents with 14 of the references take .* `memory_limit`"):
        maximum_mean_correlation(sae, references, x, memory_limit=1000)
    with pytest.raises(ValueError, match="empty"):
        maximum_mean_correlation(sae, references, [])
    with pytest.raises(ValueError, match="batch 0 has shape"):
        maximum_mean_correlation(sae, references, [x[:, :3]])
    with pytest.raises(ValueError, match=r"\(A, D\) and \(B, D\)"):
        matched_cosine(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match="finite"):
        matched_cosine(torch.full((3, 4), torch.nan), torch.randn(3, 4))
