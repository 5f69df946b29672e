"""The comparison of Matryoshka, pruned and separate SAEs: its arithmetic on made-up rows, and one small run."""

import csv
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine
from scipy import stats

from hf_matryoshka_sae.models import BatchTopKSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.progressive import fit_power_law


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import progressive_coding_judge
from progressive_coding import main, settings
from progressive_coding_judge import RANKINGS, complete, first_alike, pruned_subjects
from progressive_coding_report import _relative_fvu, ranking_parts, verdict_lines
from progressive_coding_results import METRICS, Interval, Results, claims


WIDTHS = [8, 16, 32]
METHODS = ("topk", "batch_topk")


def made_up(seed: int, **changed: float) -> dict:
    """Rows of a seed in which Matryoshka < energy < unsorted; `changed` moves the FVU of a method and ranking."""
    level = {"matryoshka": 0.3, "separate": 0.28, "energy": 0.4, "greedy": 0.38, "attribution": 0.45, "trained": 0.6}
    level |= changed
    rows = []

    def add(method, ranking, selection, name):
        for width in WIDTHS:
            fvu = level[name] * 8 / width + 0.01 * seed
            row = {"method": method, "ranking": ranking, "selection": selection, "width": width}
            rows.append(row | dict.fromkeys(METRICS, 1.0) | {"fvu": fvu, "recaptured_zero": 1 - fvu, "rsa": 1 - fvu})

    for selection in ("mask", "restrict"):
        add("matryoshka", "trained", selection, "matryoshka")
        for base in ("topk", "batch_topk"):
            for ranking in ("trained", "energy", "greedy", "attribution"):
                add(base, ranking, selection, ranking)
    add("separate", "trained", "mask", "separate")
    same = {base: {name: name for name in ("trained", "energy", "greedy", "attribution")} for base in METHODS}
    return {"seed": seed, "rows": rows, "same_ranking": same}


def test_an_interval_is_that_of_students_t():
    values = np.array([0.31, 0.29, 0.36])
    found = Interval.of(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert Interval.of(values[:1]).half is None


def test_the_verdict_follows_the_numbers():
    results = Results([made_up(seed) for seed in range(3)])
    found = claims(results)
    assert len(found) == 2 * 2 * 3 * 2 * 2 and all(claim.held == 3 for claim in found)
    first = next(claim for claim in found if claim.better == "Matryoshka" and claim.width == 16)
    assert first.gain.mean == pytest.approx(0.05) and first.gain.half == pytest.approx(0, abs=1e-12)
    lines = verdict_lines(results, found)
    assert lines[0] == (
        "- **FVU: Matryoshka < pruned by energy < unsorted** holds at every inner width in every one of 3 seeds, for "
        "both plain SAEs, at native and matched L0."
    )
    assert sum("holds at every inner width" in line for line in lines) == 3


def test_the_verdict_says_where_a_claim_fails():
    results = Results([made_up(0), made_up(1, energy=0.25), made_up(2)])
    lines = verdict_lines(results, claims(results))
    assert "**FVU: Matryoshka < pruned by energy < unsorted** does not hold everywhere: 8 of 16" in lines[0]
    assert lines[1] == (
        "  - Matryoshka against pruned by energy, TopK, native L0 (mask): better in 2 of 3 seeds at 8, 2 of 3 seeds "
        "at 16."
    )
    # A gain of very different size in each seed is not one to be sure of.
    results = Results([made_up(0, energy=0.301), made_up(1, energy=0.302), made_up(2, energy=0.5)])
    lines = verdict_lines(results, claims(results))
    assert "holds at every inner width" in lines[0]
    assert lines[1].endswith("in every seed, but with a 95% interval that reaches 0, at 8, 16.")


def test_rankings_are_held_against_energy_seed_by_seed():
    results = Results([made_up(seed) for seed in range(2)])
    expected = [100 * (0.38 / 0.40 - 1), 100 * (0.39 / 0.41 - 1)]
    assert _relative_fvu(results, "topk", "greedy", "mask", 8) == pytest.approx(expected)
    text = ranking_parts(results)[0]
    assert "Least FVU over the inner widths: **greedy**; most recaptured loss: **greedy**." in text
    assert text.index("| greedy |") < text.index("| energy |") < text.index("| attribution |")


def test_rankings_alike_are_measured_once_and_full_widths_are_those_as_trained():
    orders = {"trained": torch.arange(6), "a": torch.tensor([1, 0, 2, 3, 5, 4]), "b": torch.tensor([5, 4, 3, 2, 1, 0])}
    same = first_alike(orders, [2, 4, 6])
    assert same == {"trained": "trained", "a": "trained", "b": "b"}
    assert first_alike(orders, [1, 6])["a"] == "a"
    measured = [("trained", 2), ("trained", 4), ("trained", 6), ("b", 2), ("b", 4)]
    rows = [
        {"method": "topk", "ranking": ranking, "selection": selection, "width": width, "fvu": number}
        for selection in ("mask", "restrict")
        for number, (ranking, width) in enumerate(measured)
    ]
    found = complete(rows, {"topk": same}, [2, 4, 6])
    by_key = {(row["method"], row["ranking"], row["selection"], row["width"]): row["fvu"] for row in found}
    assert len(found) == len(by_key) == 2 * 9 + 1
    assert [by_key["topk", "a", "restrict", width] for width in (2, 4, 6)] == [0, 1, 2]
    assert [by_key["topk", "b", "mask", width] for width in (2, 4, 6)] == [3, 4, 2]
    assert by_key["separate", "trained", "mask", 6] == 2


def test_matched_subjects_fire_k_latents_at_every_width():
    states = [torch.randn(512, 16) for _ in range(4)]
    given = {"widths": WIDTHS, "k": 3}
    for name, config in (("topk", TopKSAEConfig), ("batch_topk", BatchTopKSAEConfig)):
        sae = build_sae(config(d_in=16, num_latents=32, k=3)).eval()
        sae.b_enc.data.fill_(5.0)  # every place is taken by a latent that fires
        if name == "batch_topk":
            sae.threshold.fill_(6.0)
        orders = {"trained": torch.arange(32), "random": torch.randperm(32)}
        subjects = pruned_subjects(name, sae, orders, states, given)
        for label, subject in subjects.items():
            subject.count(subject.encode(torch.cat(states)))
            for row, width in zip(subject.firing_rows(), subject.widths, strict=True):
                if "/restrict" in label:
                    assert row["l0"] == pytest.approx(3, rel=0.02), (label, width)
                elif width < 32:
                    assert row["l0"] < subjects[f"{name}/trained/mask"].firing_rows()[-1]["l0"]
        masked = {width for label, s in subjects.items() if label.endswith("random/mask") for width in s.widths}
        assert masked == {8, 16}


def test_wrong_settings_are_named(capsys):
    assert settings(["--model", "embedded", "--k", "8"])["hookpoint"] == "model.layers.2"
    assert main(["--model", "embedded", "--widths", "64", "32"]) == 2
    assert "increasing, from k (16) up; got [64, 32]" in capsys.readouterr().err
    assert main(["--model", "embedded", "--seeds", "1", "1"]) == 2


@pytest.mark.release
def test_a_small_run_is_reported_and_not_done_twice(tmp_path, monkeypatch, capsys):
    arguments = ["--model", "embedded", "--widths", "32", "64", "--k", "4", "--seeds", "3", "4", "--tokens", "2048"]
    arguments += ["--eval_tokens", "600", "--statistics_tokens", "600", "--batch_size", "256"]
    arguments += ["--output_dir", str(tmp_path)]
    judged = []

    def judge_once(*given):
        judged.append(judged[0] if judged else progressive_coding_judge.judge(*given))
        return judged[-1]

    with monkeypatch.context() as patch:
        patch.setattr("progressive_coding.judge", judge_once)
        # Most of a small comparison's time would go into p-values, timed steps, and the layout of pictures.
        patch.setattr(progressive_coding_judge, "fit_power_law", partial(fit_power_law, resamples=20))
        patch.setattr(progressive_coding_judge, "WARM_UP", 1)
        patch.setattr(progressive_coding_judge, "TURNS", 2)
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        assert main(arguments) == 0 and len(judged) == 2
    found = json.loads((tmp_path / "results.json").read_text())
    with open(tmp_path / "results.csv") as file:
        lines = list(csv.DictReader(file))
    per_seed = 2 * 2 * len(RANKINGS) * 2 + 2 * 2 + 2
    assert len(found["seeds"][0]["rows"]) == per_seed
    assert {line["seed"] for line in lines} == {"3", "4"}
    assert len(lines) == 2 * per_seed * len(METRICS)
    report = (tmp_path / "report.md").read_text()
    assert "## Verdict" in report and "nan" not in report
    for name in ("curves-topk.png", "curves-batch_topk.png", "seed-3/power_laws.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    rows = {(r["method"], r["ranking"], r["selection"], r["width"]): r for r in found["seeds"][0]["rows"]}
    trained = json.loads((tmp_path / "seed-3" / "results.json").read_text())["results"][0]["saes"]
    for method, name, width in (
        ("separate", "topk-32", 32),
        ("topk", "topk-64", 64),
        ("matryoshka", "matryoshka", 32),
    ):
        row = next(row for row in trained[name] if row["width"] == width)
        assert rows[method, "trained", "mask", width]["fvu"] == pytest.approx(row["fvu"], rel=1e-4)
        assert rows[method, "trained", "mask", width]["l0"] == pytest.approx(row["l0"], rel=1e-4)

    monkeypatch.setattr("progressive_coding.train", None)
    monkeypatch.setattr("progressive_coding.judge", None)
    (tmp_path / "report.md").unlink()
    assert main(arguments) == 0 and (tmp_path / "report.md").exists()
    assert main([*arguments, "--k", "5"]) == 2
    assert "differs in saes" in capsys.readouterr().err
