"""What is recovered: perfect and random dictionaries, order and prefixes of latents, matching by brute force."""

from itertools import permutations

import pytest
import torch

from hf_matryoshka_sae.evaluation import random_dictionary
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, ReluSAEConfig, build_sae
from hf_matryoshka_sae.studies.known_features.feature_recovery import assign, encode, recovery, supervised_sae
from hf_matryoshka_sae.studies.known_features.synthetic import SyntheticModel, World


SCORES = ("mcc", "f1", "precision", "recall", "cosine", "uniqueness", "parents_fire")


def orthogonal() -> SyntheticModel:
    return SyntheticModel(World(features=24, d_in=32, trees=2, p_min=0.02, noise=0.0))


def truth(model: SyntheticModel, **options):
    """An SAE whose rows are the features' directions."""
    features, d_in = model.directions.shape
    sae = build_sae(MatryoshkaSAEConfig(d_in=d_in, num_latents=features, activation="relu", **options)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(model.directions)
        sae.W_dec.copy_(model.directions)
        sae.b_dec.copy_(model.bias)
        sae.b_enc.fill_(-1e-3)
    return sae


def test_the_true_directions_recover_everything():
    model = orthogonal()
    (row,) = recovery(model, truth(model, prefix_widths=[24]), samples=3000)
    for key in SCORES:
        assert row[key] == pytest.approx(1, abs=1e-4), key
    assert row["found"] == 24 and row["f1_by_decile"] == pytest.approx([1] * 10, abs=1e-4)
    assert row["l0"] == pytest.approx(model.expected_l0, rel=0.1)


def test_the_supervised_ceiling_recovers_everything_without_superposition():
    model = orthogonal()
    (row,) = recovery(model, supervised_sae(model, 3000), samples=3000)
    assert min(row[key] for key in ("mcc", "f1", "parents_fire")) > 0.999


def test_the_order_of_latents_changes_nothing():
    model = SyntheticModel(World(features=40, d_in=16, trees=4, p_min=0.02))
    sae = truth(model, prefix_widths=[40])
    (before,) = recovery(model, sae, samples=2000)
    sae.permute_(torch.randperm(40, generator=torch.Generator().manual_seed(0)))
    (after,) = recovery(model, sae, samples=2000)
    assert before["f1"] < 0.99
    for key in SCORES:
        assert before[key] == pytest.approx(after[key], abs=1e-6)


def test_the_row_of_a_width_is_that_of_the_sae_cut():
    model = SyntheticModel(World(features=40, d_in=16, trees=4, p_min=0.02))
    sae = truth(model, prefix_widths=[10, 25, 40])
    rows = recovery(model, sae, samples=2000)
    assert [row["width"] for row in rows] == [10, 25, 40]
    assert 0 in rows[0]["f1_by_decile"]  # most features have no latent there
    for row in rows:
        (cut,) = recovery(model, sae.truncate(row["width"]), [row["width"]], samples=2000)
        assert row.pop("f1_by_decile") == pytest.approx(cut.pop("f1_by_decile"))
        assert row == pytest.approx(cut)


def test_a_random_dictionary_is_near_chance():
    model = SyntheticModel(World(features=96, d_in=96, trees=4, p_min=0.01))
    sae = truth(model, prefix_widths=[96])
    random = random_dictionary(sae, [next(model.batches(4000, 3))])
    (row,), (best,) = recovery(model, random, samples=3000), recovery(model, sae, samples=3000)
    assert best["mcc"] > 0.9
    assert row["mcc"] < 0.4 and row["f1"] < 0.4 and row["cosine"] < 0.4


def test_the_figures_by_hand():
    """A feature's latent that misses half of it and fires elsewhere; a latent of nothing; a parent gone silent."""
    model = SyntheticModel(World(features=8, d_in=8, trees=1, branching=2, levels=2, p_min=0.05, noise=0.0))
    sae = truth(model, prefix_widths=[8])
    children = model.children(0)
    with torch.no_grad():
        sae.W_enc[0] -= 4 * model.directions[children].sum(0)  # silent where a child is on
        sae.W_enc[7].zero_()
        sae.b_enc[7] = -1
    (row,) = recovery(model, sae, samples=4000, seed=5)
    assert row["parents_fire"] < 0.01
    share = 1 - model.probabilities[children].sum() / model.probabilities[0]
    assert row["recall"] == pytest.approx((6 + share.item()) / 8, abs=0.02)
    assert row["f1"] == pytest.approx((6 + 2 * share.item() / (1 + share.item())) / 8, abs=0.02)
    assert row["precision"] == pytest.approx(7 / 8)
    assert row["found"] == 6 + (2 * share / (1 + share) >= 0.8) and row["uniqueness"] == 1


def test_matching_is_the_best_of_all_permutations():
    model = SyntheticModel(World(features=5, d_in=3, trees=1, branching=2, levels=2, p_min=0.2))
    torch.manual_seed(0)
    sae = build_sae(ReluSAEConfig(d_in=3, num_latents=6)).eval()
    features, x = model.sample(4000, torch.Generator().manual_seed(9))
    correlation = torch.corrcoef(torch.cat([features, encode(sae, x)], 1).T.double())[:5, 5:].nan_to_num()
    best = max(sum(abs(correlation[i, order[i]]) for i in range(5)) for order in permutations(range(6), 5))
    rows, columns = assign(correlation)
    assert correlation[rows, columns].abs().sum().item() == pytest.approx(best.item())
    # `recovery` measures on other samples than it matches on; from many both are the same
    assert recovery(model, sae, [6], samples=20_000)[0]["mcc"] == pytest.approx(best.item() / 5, abs=0.03)


def test_latents_are_matched_on_other_samples_than_they_are_measured_on():
    """With fewer samples than there are noisy latents, matching finds correlations that are not there."""
    model = SyntheticModel(World(features=20, d_in=64, trees=0, p_min=0.2, noise=40.0))
    torch.manual_seed(0)
    sae = build_sae(ReluSAEConfig(d_in=64, num_latents=400)).eval()
    few, many = (recovery(model, sae, [400], samples=samples)[0]["mcc"] for samples in (40, 4000))
    assert few < 0.25 and many < 0.1


def test_what_does_not_fit_is_told():
    model = orthogonal()
    with pytest.raises(ValueError, match="width 32, the SAE takes 8"):
        recovery(model, build_sae(ReluSAEConfig(d_in=8, num_latents=16)))
    with pytest.raises(ValueError, match="`samples` must be at least 2"):
        recovery(model, truth(model), samples=1)
    with pytest.raises(ValueError, match="`widths` must strictly increase"):
        recovery(model, truth(model), [99])
