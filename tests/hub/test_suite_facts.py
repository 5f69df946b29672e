"""A card that a full evaluation fills: of a run's folder, of one SAE's, of other weights."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from hf_matryoshka_sae.hub.card import card_assets, run_card
from hf_matryoshka_sae.studies import command, evaluating
from hf_matryoshka_sae.studies.suite import SECTIONS


REPO = "someone/tiny-sae"
NESTED = "nested/model.layers.0"


def evaluated(folder, *flags):
    """`evaluate --suite full` with two of its sections, at their least size."""
    small = [replace(each, full=each.least) for each in SECTIONS if each.name in ("fidelity", "ablation")]
    flags = ("--tokens", "240", "--context_length", "32", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "SECTIONS", small)
        assert command.main([str(folder), "--suite", "full", *flags]) == 0
    return json.loads((folder / "evaluation_suite/suite.json").read_text())


def test_a_run_s_card_shows_what_the_evaluation_found(run_copy):
    before = str(run_card(run_copy, REPO))
    assert "no interpretability score was measured" in before
    found = evaluated(run_copy)
    text = str(run_card(run_copy, REPO))
    assert "no interpretability score was measured" not in text
    assert "## Interpretability and downstream effects" in text
    assert [place["hookpoint"] for place in found["places"]] == ["model.layers.0", "model.layers.2:input"]
    for place in found["places"]:
        section = next(each for each in place["sections"] if each["name"] == "ablation")
        for name in place["weights"]:
            for row in section["rows"][name]:
                low, high = row["fraction_interval"]
                assert f"{row['fraction']:.4f} [{low:.4f} {high:.4f}]" in text
    for path, file in card_assets(run_copy).items():
        assert f"]({path})" in text and file.is_file()
    assert any("suite-ablation.png" in path for path in card_assets(run_copy))
    # Its own tables stay those of the run.
    assert before.split("## Results")[1].split("## ")[0] == text.split("## Results")[1].split("## ")[0]


def test_an_sae_of_no_run_gets_its_tables_from_the_evaluation(run_copy, tmp_path):
    alone = tmp_path / "alone"
    AutoModel.from_pretrained(run_copy / NESTED).save_pretrained(alone)
    assert "Nothing about its quality has been measured" in str(run_card(alone, REPO))
    found = evaluated(alone)
    text = str(run_card(alone, REPO))
    assert "## Results" in text and "## Interpretability and downstream effects" in text
    (place,) = found["places"]
    fidelity = place["sections"][0]
    (name,) = place["weights"]
    for row in fidelity["rows"][name]:
        assert f"| {row['fvu']:.4f} |" in text
    assert "Nothing about its quality has been measured" not in text


def test_results_of_other_weights_are_left_out(run_copy, tmp_path):
    alone = tmp_path / "alone"
    sae = AutoModel.from_pretrained(run_copy / NESTED)
    sae.save_pretrained(alone)
    evaluated(alone)
    with torch.no_grad():
        sae.b_dec.add_(1.0)
    sae.save_pretrained(alone)
    text = str(run_card(alone, REPO))
    assert "## Interpretability" not in text and "## Results" not in text
    assert "suite-ablation" not in text


@pytest.mark.release
def test_an_evaluation_goes_on_where_it_was_killed(run_copy, capsys):
    first = evaluated(run_copy)
    file = run_copy / "evaluation_suite/model.layers.0/ablation.json"
    file.unlink()
    kept = (run_copy / "evaluation_suite/model.layers.0/fidelity.json").stat().st_mtime_ns
    again = evaluated(run_copy)
    assert file.is_file() and (run_copy / "evaluation_suite/model.layers.0/fidelity.json").stat().st_mtime_ns == kept
    rows = [[section["rows"] for section in place["sections"]] for place in first["places"]]
    assert [[section["rows"] for section in place["sections"]] for place in again["places"]] == rows


def test_flags_that_do_not_fit_are_refused(run_copy, capsys):
    for flags, message in (
        (["--minutes", "3"], "belong to --suite full"),
        (["--suite", "full", "--no_baselines"], "leave --no_baselines away"),
        (["--suite", "full", "--minutes", "-1"], "`minutes` must be above 0"),
        (["--suite", "full", "--labelled", "nowhere.parquet"], "nowhere.parquet"),
        (["--lm_exponent", "-1"], "exponent above 0"),
        (["--lm_exponent", "0.1", "--lm_irreducible", "50"], "must be below the language model's"),
    ):
        assert command.main([str(run_copy), "--tokens", "300", "--context_length", "32", *flags]) == 2
        assert message in capsys.readouterr().err
