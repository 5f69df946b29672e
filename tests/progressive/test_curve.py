"""The curve against evaluations of one width at a time, and its rate against the bit stream."""

import json

import pytest
import torch

from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.progressive import (
    default_widths,
    encode_progressive,
    latent_statistics,
    plot_curves,
    progressive_curve,
)


@pytest.fixture(scope="module")
def data():
    return open_heldout(hookpoint="model.layers.1", tokens=600, context_length=40, lm_batch_size=5)


@pytest.fixture
def sae(data):
    torch.manual_seed(2)
    config = MatryoshkaSAEConfig(d_in=128, num_latents=64, k=6, activation="topk", prefix_widths=[16, 64])
    sae = build_sae(config).eval()
    sae.b_dec.data = torch.cat(list(data.activations())).mean(0)
    sae.W_enc.data *= 0.3
    return sae


def test_every_width_is_what_it_is_alone(data, sae):
    curve = progressive_curve(sae, data, [5, 16, 40, 64], loss_widths=[16, 64], similarity_tokens=20, show=False)
    for row in curve.rows:
        alone = evaluate_fidelity(data, {"it": Dictionary(sae, [row["width"]])}, similarity_tokens=20, show=False)
        (expected,) = alone["subjects"]["it"]
        for key in ("fvu", "l0", "l1", "dead", "cossim"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
        assert row["rsa"]["spearman"] == pytest.approx(expected["rsa"]["spearman"], abs=1e-6)
        if row["width"] in (16, 64):
            assert row["ce"] == pytest.approx(expected["ce"], rel=1e-6)
            assert row["kl"] == pytest.approx(expected["kl"], rel=1e-5)
        else:
            assert row["ce"] is None and "kl" not in row
    assert curve.column("width") == [5, 16, 40, 64]


def test_the_rate_is_that_of_the_bit_stream(data, sae):
    x = torch.cat(list(data.activations()))
    statistics = latent_statistics(sae, [x])
    curve = progressive_curve(sae, [x], [16, 64], statistics=statistics, similarity_tokens=0, show=False)
    code = pytest.importorskip("constriction") and encode_progressive(sae, x, statistics, groups=[16, 64])
    measured = 8 * len(code) / len(x)
    assert curve.rows[-1]["bits"] == pytest.approx(measured, rel=0.1)
    assert curve.rows[0]["bits"] < curve.rows[1]["bits"]
    assert all(row["fvu"] < row["fvu_coded"] < 1.2 * row["fvu"] for row in curve.rows)


def test_restricting_gives_places_to_those_inside(data, sae):
    x = [torch.cat(list(data.activations()))]
    restricted = progressive_curve(sae, x, [16], "restrict", similarity_tokens=0, show=False)
    small = progressive_curve(sae.truncate(16), x, [16], similarity_tokens=0, rate=False, show=False)
    assert restricted.rows[0]["fvu"] == pytest.approx(small.rows[0]["fvu"], rel=1e-6)
    assert restricted.rows[0]["l0"] == small.rows[0]["l0"]


def test_files_and_picture(data, sae, tmp_path):
    curve = progressive_curve(sae, data, [16, 64], similarity_tokens=20, show=False)
    curve.save(tmp_path)
    saved = json.loads((tmp_path / "progressive_curve.json").read_text())
    assert [row["width"] for row in saved["rows"]] == [16, 64] and saved["hookpoint"] == "model.layers.1"
    plot_curves({"a": curve, "b": curve}, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000 < (tmp_path / "progressive_curve.png").stat().st_size
    assert "recaptured" in str(curve)


def test_default_widths_hold_the_prefixes(sae):
    widths = default_widths(sae)
    assert widths == sorted(set(widths)) and {16, 64} <= set(widths) and widths[0] == 1
    assert default_widths(build_sae(TopKSAEConfig(d_in=4, num_latents=3, k=1)))[-1] == 3


def test_what_does_not_fit_is_said(data, sae):
    with pytest.raises(ValueError, match="`loss_widths` must be among"):
        progressive_curve(sae, data, [16], loss_widths=[64], similarity_tokens=0, rate=False, show=False)
    with pytest.raises(ValueError, match="between 1 and 64"):
        progressive_curve(sae, data, [65], show=False)
