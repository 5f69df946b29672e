"""The `evaluate` modules against the evaluation itself, their doctests, and the snippets of their cards."""

import doctest
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_matryoshka_sae
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.evaluation.reconstruction import ReconstructionSums
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, build_sae


evaluate = pytest.importorskip("evaluate")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "hf_matryoshka_sae/metrics"
NAMES = ("sae_fidelity", "progressive_curve")
WIDTHS = [8, 20, 48]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the modules are those of the installed package, wherever a user is


def load(name):
    return evaluate.load(hf_matryoshka_sae.metrics.path(name), keep_in_memory=True)


def test_an_unknown_metric_lists_those_there_are():
    with pytest.raises(ValueError, match="no metric 'fidelity'; there are progressive_curve, sae_fidelity"):
        hf_matryoshka_sae.metrics.path("fidelity")


@pytest.fixture(scope="module")
def measured():
    """Batches of the embedded model, an SAE's reconstructions `(P, n, D)` and latents, and the evaluation's rows."""
    torch.manual_seed(1)
    sae = build_sae(MatryoshkaSAEConfig(d_in=128, num_latents=48, k=5, prefix_widths=WIDTHS)).eval()
    sae.W_enc.data *= 0.1
    sae.threshold.data.fill_(0.3)
    data = open_heldout(hookpoint="model.layers.1", tokens=700, context_length=40, lm_batch_size=5)
    result = evaluate_fidelity(data, {"it": Dictionary(sae)}, language_model=False, similarity_tokens=0, show=False)
    batches = []
    with torch.no_grad():
        for x in data.activations():
            latents = sae.encode(x)
            batches.append((x, sae.decode_prefixes(latents), latents.to_dense().double()))
    rows = [{name: value for name, value in row.items() if value is not None} for row in result["subjects"]["it"]]
    return batches, rows


def sums_of(x, reconstructions, dense=None):
    sums = ReconstructionSums.zeros(len(reconstructions), x.shape[1])
    sums.add(x, reconstructions)
    if dense is None:
        return sums.to_dict()
    return {**sums.to_dict(), "fired": (dense > 0).sum(0).tolist(), "total": dense.sum(0).tolist()}


def test_sums_of_batches_give_the_numbers_of_the_evaluation(measured):
    batches, rows = measured
    curve, fidelity = load("progressive_curve"), load("sae_fidelity")
    assert len(batches) > 1
    for x, reconstructions, dense in batches:
        sums = sums_of(x, reconstructions, dense)
        curve.add(prediction=sums, reference=sums)
        last = sums_of(x, reconstructions[-1:], dense)
        fidelity.add_batch(predictions=[last], references=[last])
    found, last = curve.compute(widths=WIDTHS), fidelity.compute()
    assert last.pop("tokens") == found["tokens"] == sum(len(x) for x, _, _ in batches)
    assert {"width", *last} == set(rows[0])
    for name in rows[0]:
        assert found[name] == pytest.approx([row[name] for row in rows], abs=1e-6, rel=1e-6)
    for name, value in last.items():
        assert value == pytest.approx(rows[-1][name], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "lists"])
def test_rows_in_batches_give_the_numbers_of_one_batch_of_all(measured, kind):
    x, reconstructions, dense = (torch.cat(parts, parts[0].dim() - 2) for parts in zip(*measured[0], strict=True))
    x, reconstructions, dense = x[:90, :12], reconstructions[:, :90, :12], dense[:90]
    convert = {"tensors": lambda t: t, "arrays": lambda t: t.double().numpy(), "lists": lambda t: t.tolist()}[kind]
    sums = ReconstructionSums.zeros(3, 12)
    sums.add(x, reconstructions)
    wanted = sums.rows()
    curve, fidelity = load("progressive_curve"), load("sae_fidelity")
    for part in (slice(0, 50), slice(50, 90)):
        curve.add_batch(predictions=convert(reconstructions[:, part].transpose(0, 1)), references=convert(x[part]))
        fidelity.add_batch(predictions=convert(reconstructions[1, part]), references=convert(x[part]))
    found = curve.compute(widths=WIDTHS)
    alone = fidelity.compute(l0=(dense > 0).sum(1).tolist(), l1=dense.sum(1))
    assert alone["l0"] == pytest.approx((dense > 0).sum().item() / 90)
    assert alone["l1"] == pytest.approx(dense.sum().item() / 90)
    for name in wanted[0]:
        assert found[name] == pytest.approx([row[name] for row in wanted], abs=1e-6, rel=1e-6)
        assert alone[name] == pytest.approx(wanted[1][name], abs=1e-6, rel=1e-6)


def test_what_a_curve_comes_to():
    x = torch.randn(100, 4)
    x -= x.mean(0)
    shrunk = torch.stack([(1 - fvu**0.5) * x for fvu in (0.64, 0.36, 0.04)], 1)
    found = load("progressive_curve").compute(
        predictions=shrunk, references=x, widths=[10, 100, 1000], fvu_targets=[0.9, 0.5, 0.36, 0.2, 0.01]
    )
    assert found["fvu"] == pytest.approx([0.64, 0.36, 0.04], abs=1e-6)
    assert found["area_fvu"] == pytest.approx((0.5 * 0.64 + 0.36 + 0.5 * 0.04) / 2, abs=1e-6)
    expected = [10, 10 ** (1 + 0.5), 100, 10 ** (2 + 0.5)]
    assert found["width_for_fvu"] == [*(pytest.approx(width, rel=1e-4) for width in expected), None]
    one = load("progressive_curve").compute(predictions=shrunk[:, :1], references=x, widths=[10])
    assert one["area_fvu"] == one["fvu"][0]


def test_wrong_input_is_named():
    x = np.ones((4, 3), np.float32) * np.arange(4)[:, None]
    metric = load("sae_fidelity")
    sums = sums_of(torch.from_numpy(x).float(), torch.from_numpy(x).float()[None])
    two = sums_of(torch.from_numpy(x).float(), torch.from_numpy(x).float().expand(2, 4, 3))
    for columns, message in [
        ((x, x[:, :2]), r"shape \(N, D\)"),
        ((x, x[:3]), "same number of rows"),
        ((x[:0], x[:0]), "at least 1"),
        ((x, x * np.nan), "finite"),
        (([[1.0], [1.0, 2.0]], x[:2]), "as many numbers"),
        ((x[None], x[None]), r"shape \(N, D\)"),
        ((sums, sums), "a list of sums, got dict"),
        (([{"x": [1.0]}], [sums]), "lack square_error"),
        (([sums], [{**sums, "x": "abc"}]), "`x` must be a list of finite numbers"),
        (([sums], [{**sums, "norm_in": float("nan")}]), "`norm_in` must be a finite number"),
        (([sums], [{**sums, "x": [1.0]}]), "`x_square` must have shape"),
        (([two], [two]), "hold 2 widths"),
        (([{**sums, "fired": [1], "total": [1.0, 2.0]}], [sums]), "an entry for each latent"),
        (([{**sums, "fired": [1]}], [sums]), "an entry for each latent"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=columns[0], references=columns[1])
        metric = load("sae_fidelity")
    with pytest.raises(ValueError, match="each of 4 tokens"):
        metric.compute(predictions=x, references=x, l0=[1.0])
    curve = load("progressive_curve")
    with pytest.raises(ValueError, match=r"\(N, P, D\)"):
        curve.compute(predictions=x, references=x, widths=[4])
    for widths in (None, [8], [8, 8], [0, 8]):
        with pytest.raises(ValueError, match="2 strictly increasing numbers"):
            load("progressive_curve").compute(predictions=[two], references=[two], widths=widths)
    with pytest.raises(ValueError, match="fewer than the width 9"):
        firing = {**two, "fired": [1] * 5, "total": [1.0] * 5}
        load("progressive_curve").compute(predictions=[firing], references=[firing], widths=[4, 9])


@pytest.mark.parametrize("name", NAMES)
def test_the_doctest_of_the_inputs_runs(name):
    metric = load(name)
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, None)
    outcome = doctest.DocTestRunner().run(test)
    assert outcome.attempted >= 6 and not outcome.failed
    assert metric.description and metric.citation


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_all_and_its_snippets_run(name):
    card = (FOLDER / name / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert "sdk: gradio" in front and "- evaluate\n- metric" in front
    for title in ("Description", "How to Use", "Inputs", "Output Values", "Limitations and Bias", "Citation"):
        assert re.search(rf"^##+ {title}$", body, re.MULTILINE), title
    assert load(name).citation.strip() in body
    blocks = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, name, "exec"), {})


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_every_value(name):
    card = (FOLDER / name / "README.md").read_text()
    x = torch.randn(9, 2)
    sums = {**sums_of(x, x[None] * 0.5), "fired": [3], "total": [1.0]}
    found = load(name).compute(
        predictions=[sums], references=[sums], **({"widths": [1]} if name == "progressive_curve" else {})
    )
    assert all(f"`{key}`" in card for key in found)
    assert (FOLDER / name / "requirements.txt").read_text().split() == ["hf_matryoshka_sae[metrics]"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
