"""A run that missed what it was asked for ends with a warning that names the field to turn."""

import json

import pytest
import torch

from hf_matryoshka_sae.training import RunConfig, train
from hf_matryoshka_sae.training.run.report import missed_targets

from ..sae.test_learner import learner


def found(l0, dead):
    narrow = {"width": 8, "l0": 0.1, "dead": 1.0}
    return {"tokens": 60_000, "saes": {"sae": [narrow, {"width": 64, "l0": l0, "dead": dead}]}}


def missed(fields, l0, dead=0.0, silent=None, in_training=16.0):
    one = learner(**fields)
    one.updates, one.last = 1000, {"l0": torch.tensor(in_training)}
    one.tokens_since_fired[: round(64 * (dead if silent is None else silent))] = 100_000
    return missed_targets(one, found(l0, dead), 300_000)


FAMILIES = {
    "relu": {"type": "relu", "k": None, "target_l0": 16.0},
    "gated": {"type": "gated", "k": None, "target_l0": 16.0},
    "jumprelu": {"type": "jumprelu", "k": None, "target_l0": 16.0},
    "nested jumprelu": {"type": "matryoshka", "activation": "jumprelu", "k": None, "target_l0": 16.0},
    "nabeshima": {"preset": "nabeshima", "k": None, "target_l0": 16.0},
    "topk": {"type": "topk", "k": 16},
    "batch_topk": {"type": "batch_topk", "k": 16},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_target_that_is_met_is_no_warning(name):
    for l0 in (14.5, 16.0, 17.5):
        assert missed(FAMILIES[name], l0, dead=0.1) == []


@pytest.mark.parametrize(
    ("name", "l0", "levers"),
    [
        ("relu", 30.7, ("`calibration_tokens`",)),
        ("nested jumprelu", 9.0, ("`calibration_tokens`",)),
        ("topk", 12.0, ("`tokens`", "smaller `k`")),
        ("batch_topk", 19.0, ("`calibration_tokens`",)),
    ],
)
def test_an_l0_that_is_off_is_told_with_what_turns_it(name, l0, levers):
    (text,) = missed(FAMILIES[name], l0)
    field = "k" if "topk" in name else "target_l0"
    assert text.startswith(f"sae at layer: {l0:.1f} latents fire per held-out token, but `{field}` asks for 16.")
    assert all(lever in text for lever in levers), text


@pytest.mark.parametrize(
    ("name", "levers"),
    [
        ("relu", ("`controller_rate` (0.03 here)", "`tokens` (300,000 here)")),
        ("nabeshima", ("`controller_rate`",)),
        ("nested jumprelu", ("`sparsity_coefficient` (10 here)", "`threshold_lr_scale` (0.3 here)")),
    ],
)
def test_thresholds_that_had_to_move_far_at_the_end_are_told(name, levers):
    assert missed(FAMILIES[name], 16.0, in_training=18.0) == []
    (text,) = missed(FAMILIES[name], 16.0, in_training=24.0)
    assert "training ended with 24.0 latents per token" in text
    assert all(lever in text for lever in levers), text


@pytest.mark.parametrize(
    ("fields", "lever"),
    [
        (
            {**FAMILIES["gated"], "lr": 0.015, "auxk_coefficient": 0.0},
            "Lower `lr` (0.015 here), or set `auxk_coefficient`",
        ),
        (FAMILIES["topk"], "Train on more `tokens` (300,000 here), raise `auxk_coefficient` (0.03125 here)"),
    ],
    ids=str,
)
def test_dead_latents_are_told_with_how_many_tokens_were_looked_at(fields, lever):
    (text,) = missed(fields, 16.0, dead=0.94)
    assert "94.0% of the latents are dead" in text and "none of 60,000 held-out tokens" in text and "10%" in text
    assert "93.8% on none of the last 100,000 of training" in text
    assert lever in text


def test_latents_that_fired_in_training_are_not_called_dead_for_little_held_out_text():
    assert missed(FAMILIES["topk"], 16.0, dead=0.5, silent=0.05) == []


def test_no_target_is_none_missed():
    fields = {"type": "relu", "k": None, "target_l0": None, "sparsity_coefficient": 0.1}
    assert missed(fields, 50.0) == []


def test_a_runs_last_lines_and_its_files_say_what_was_missed(tmp_path, caplog):
    saes = [
        {"type": "gated", "name": "off", "num_latents": 64, "target_l0": 2.0, "start_at_target": False},
        {"type": "batch_topk", "name": "met", "num_latents": 64, "k": 4},
    ]
    run = {
        "model": "embedded",
        "dataset": {"path": "embedded"},
        "hookpoints": ["model.layers.1"],
        "context_length": 64,
        "tokens": 4 * 256,
        "batch_size": 256,
        "lm_batch_size": 8,
        "eval_tokens": 1000,
        "eval_baselines": False,
        "saes": saes,
    }
    (result,) = train(RunConfig.from_dict({**run, "output_dir": str(tmp_path)}))
    assert result["saes"]["off"][-1]["l0"] == pytest.approx(2.0, rel=0.3)  # thresholds have moved, by a lot
    for name in ("results.json", "provenance.json"):
        written = json.loads((tmp_path / name).read_text())
        warnings = written["warnings"]
        assert any("off at model.layers.1: training ended with" in text for text in warnings)
        assert not any("met at" in text and "fire per" in text for text in warnings)
    assert written["saes"]["off/model.layers.1"]["calibration"]["threshold_shift"] > 0
    assert warnings[-1] in caplog.records[-1].message and caplog.records[-1].levelname == "WARNING"
