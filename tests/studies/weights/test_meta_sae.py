"""Meta-SAEs: composed rows are explained, random ones less; the explained share by hand; what does not matter."""

import json
from importlib import import_module

import pytest
import torch
from torch.nn.functional import normalize

from hf_matryoshka_sae.models import MatryoshkaSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.studies.weights.meta_sae import explained_variance, meta_sae


module = import_module("hf_matryoshka_sae.studies.weights.meta_sae")  # the package has a function of that name


D, F = 64, 256


def with_decoder(rows: torch.Tensor, **options):
    sae = build_sae(TopKSAEConfig(d_in=rows.shape[1], num_latents=len(rows), k=4, **options)).eval()
    with torch.no_grad():
        sae.W_dec.copy_(rows)
    return sae


def sums_of_pairs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    atoms = normalize(torch.randn(24, D, generator=generator), dim=1)
    pairs = torch.stack([torch.randperm(24, generator=generator)[:2] for _ in range(F)])
    return atoms[pairs[:, 0]] + atoms[pairs[:, 1]]


@pytest.mark.release
def test_sums_of_few_atoms_are_explained_and_random_rows_less():
    composed = meta_sae(with_decoder(sums_of_pairs()), steps=400, lr=3e-3, seeds=(0,), show=False)
    dictionary, random = composed.records
    assert dictionary["explained"] > 0.9
    assert random["explained"] < 0.75 and random["subject"] == "random (sae)"
    gaussian = meta_sae(with_decoder(torch.randn(F, D)), steps=400, lr=3e-3, seeds=(0,), show=False)
    assert gaussian.records[0]["explained"] == pytest.approx(gaussian.records[1]["explained"], abs=0.03)


def test_the_explained_share_is_that_of_the_trained_weights(monkeypatch):
    """Everything after training again: the k * F largest activations of all rows, decoded, against the variance."""
    kept = []
    monkeypatch.setattr(module, "build_sae", lambda config: kept.append(build_sae(config)) or kept[-1])
    rows = normalize(torch.randn(64, D, generator=torch.Generator().manual_seed(3)) + 0.3, dim=1)
    found = explained_variance(rows, 50, 24, 1e-2, seed=1)
    (sae,) = kept
    assert sae.config.num_latents == 16
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(16), atol=1e-5)
    pre = (rows - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    chosen = torch.zeros(pre.numel(), dtype=torch.bool)
    chosen[pre.flatten().topk(4 * 64).indices] = True
    values = torch.where(chosen.view_as(pre), pre, 0.0).clamp(min=0)
    error = (values @ sae.W_dec + sae.b_dec - rows).square().sum()
    variance = (rows - rows.mean(0)).square().sum()
    assert found == pytest.approx(1 - (error / variance).item(), abs=1e-5)


def test_lengths_of_rows_and_their_common_part_count_for_nothing():
    rows = sums_of_pairs()
    options = dict(steps=40, seeds=(0,), baselines=False, show=False)
    first = meta_sae(with_decoder(rows), **options).records
    second = meta_sae(with_decoder(rows * (torch.rand(F, 1) + 0.1)), **options).records
    assert first[0]["explained"] == pytest.approx(second[0]["explained"], abs=1e-3)
    with_zeros = torch.cat([rows, torch.zeros(3, D)])
    assert meta_sae(with_decoder(with_zeros), **options).records[0]["explained"] == pytest.approx(
        first[0]["explained"], abs=1e-6
    )


def test_a_prefix_is_the_dictionary_cut():
    torch.manual_seed(0)
    sae = build_sae(MatryoshkaSAEConfig(d_in=D, num_latents=64, prefix_widths=[16, 32, 64], k=4)).eval()
    options = dict(steps=20, seeds=(5,), show=False)
    whole, cut = meta_sae(sae, **options), meta_sae(sae.truncate(32), **options)
    assert [row["width"] for row in whole.records] == [16, 32, 64] * 2
    assert [row["explained"] for row in whole.records if row["width"] == 32] == pytest.approx(
        [row["explained"] for row in cut.records if row["width"] == 32]
    )


def test_seeds_give_an_interval_and_are_repeatable():
    sae = with_decoder(sums_of_pairs())
    options = dict(steps=30, seeds=(0, 1, 2), show=False)
    first, again = meta_sae({"a": sae}, **options), meta_sae({"a": sae}, **options)
    assert first.records == again.records
    values = torch.tensor(first.records[0]["seeds"]).double()
    half = 4.302652729911275 * values.std() / 3**0.5
    assert first.records[0]["interval"] == pytest.approx(
        (values.mean() + torch.stack([-half, half])).tolist(), abs=1e-7
    )
    assert len(set(first.records[0]["seeds"])) == 3
    assert meta_sae(sae, steps=5, seeds=(0,), show=False).records[0]["interval"] is None


def test_it_is_shown_and_saved(tmp_path):
    result = meta_sae(with_decoder(sums_of_pairs()), steps=5, seeds=(0, 1), show=False)
    assert "random (sae)" in str(result) and "compare with random rows" in str(result)
    result.save(tmp_path)
    assert json.loads((tmp_path / "meta_sae.json").read_text())["rows"] == result.records
    assert (tmp_path / "meta_sae.png").stat().st_size > 5000


def test_what_has_no_meta_sae_is_told():
    sae = with_decoder(sums_of_pairs())
    with pytest.raises(ValueError, match="needs 8 rows with a direction, the first 5 of `sae` have 5"):
        meta_sae(sae, [5, F])
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        meta_sae(sae, steps=0)
    with torch.no_grad():
        sae.W_dec[3, 3] = torch.nan
    with pytest.raises(ValueError, match="The decoder of `sae` holds NaN"):
        meta_sae(sae)
