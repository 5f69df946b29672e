"""What a run writes down about itself: sessions that add up, what was folded in, no secrets and no places."""

import json
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from hf_matryoshka_sae.models.digests import folder_digest
from hf_matryoshka_sae.training import Interrupted, RunConfig, train
from hf_matryoshka_sae.training.run.provenance import (
    describe_model,
    read_provenance,
    typed_command,
    without_places,
    without_secrets,
)

from .test_trainer import RUN


SMALL = {
    **RUN,
    "tokens": 8 * 128,
    "batch_size": 128,
    "context_length": 32,
    "checkpoint_every": 2,
    "eval_tokens": 600,
    "eval_baselines": False,
    "calibration_tokens": 1000,
}
SMALL["saes"] = [{"type": "matryoshka", "name": "nested", "num_latents": 64, "k": 4}]


def config(folder, **fields):
    return RunConfig.from_dict({**SMALL, "output_dir": str(folder), **fields})


def test_a_run_says_what_was_folded_in_and_calibrated(finished_run):
    found = read_provenance(finished_run)
    sae = found["saes"]["nested/model.layers.0"]
    weights = load_file(finished_run / "nested/model.layers.0/model.safetensors")
    assert sae["calibration"]["threshold"] == pytest.approx(weights["threshold"][0].item(), rel=1e-5)
    assert (sae["calibration"]["l0"], sae["calibration"]["tokens"]) == (4, 1024)
    assert sae["mean_norm"] > 0 and sae["scale"] > 0
    assert sae["weights"] == folder_digest(finished_run / "nested/model.layers.0")
    assert found["tokens"] == 10 * 128
    assert found["language_model"]["class"] == "LlamaForCausalLM"
    (session,) = found["sessions"]
    assert (session["from_step"], session["to_step"]) == (0, 10)
    assert session["seconds"] > 0 and session["versions"]["torch"] == version("torch")
    assert session["hardware"]["processes"] == 1


def test_sessions_of_a_resumed_run_add_up(tmp_path, interrupt):
    interrupt(4)
    with pytest.raises(Interrupted):
        train(config(tmp_path))
    stopped = read_provenance(tmp_path)
    assert [each["to_step"] for each in stopped["sessions"]] == [4] and stopped["tokens"] == 4 * 128
    train(config(tmp_path))
    first, second = read_provenance(tmp_path)["sessions"]
    assert first == stopped["sessions"][0]
    assert (second["from_step"], second["to_step"]) == (4, 8)


def test_starting_over_forgets_earlier_sessions_and_families_without_calibration_name_none(finished_run, tmp_path):
    (tmp_path / "provenance.json").write_text((finished_run / "provenance.json").read_text())
    saes = [{"type": "topk", "name": "plain", "num_latents": 64, "k": 4}]
    train(config(tmp_path, resume=False, tokens=256, saes=saes))
    found = read_provenance(tmp_path)
    assert [each["from_step"] for each in found["sessions"]] == [0]
    assert "calibration" not in found["saes"]["plain/model.layers.1"]  # a run of no family that has one


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_file_is_no_provenance(tmp_path, text):
    (tmp_path / "provenance.json").write_text(text)
    assert read_provenance(tmp_path) == {}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            ["/opt/bin/python3.11", "-m", "hf_matryoshka_sae.train", "--k", "3"],
            "python -m hf_matryoshka_sae.train --k 3",
        ),
        (["/opt/bin/python", "/opt/bin/matryoshka-sae", "demo"], "matryoshka-sae demo"),
        (["python", "train.py", "--config=/home/me too/run.yaml"], "python train.py --config=run.yaml"),
        (["python", "train.py", "--init_from", "~/runs/a"], "python train.py --init_from a"),
        (["python", "train.py", "--model", "user/model"], "python train.py --model user/model"),
        (["python", "train.py", "--output_dir", "../runs/x"], "python train.py --output_dir ../runs/x"),
        (["python", "train.py", "--token", "abc"], "python train.py --token '***'"),
        (["python", "train.py", "--hub_token=abc"], "python train.py '--hub_token=***'"),
        (["python", "train.py", "--tokens", "5"], "python train.py --tokens 5"),
        (["python", "train.py", "hf_abcdefGHIJ0123456789"], "python train.py '***'"),
        (["python", "-c", "import secret"], None),
        (["python"], None),
        (["python", "-m", "ipykernel_launcher", "-f", "/x/kernel.json"], None),
    ],
)
def test_the_command_is_shown_without_secrets_and_places(words, shown):
    assert typed_command(words) == shown


def test_secrets_and_places_in_other_texts():
    assert without_secrets("https://me:pw@host/x hf_matryoshka_sae") == "https://***@host/x hf_matryoshka_sae"
    assert without_places('{"path": "/data/a/b.txt"}') == '{"path": "b.txt"}'
    assert without_places("https://host/a/b") == "https://host/a/b"


def test_the_digest_changes_with_the_weights_and_covers_all_shards(tmp_path):
    assert folder_digest(tmp_path) is None
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"a")
    one = folder_digest(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"b")
    assert folder_digest(tmp_path) != one


def test_a_model_without_a_config_is_described_too():
    assert describe_model(torch.nn.Linear(2, 3)) == {"class": "Linear", "parameters": 9}


def test_the_file_is_json_without_places_of_this_machine(finished_run):
    text = (finished_run / "provenance.json").read_text()
    assert json.loads(text)["format"] == 1
    assert str(finished_run) not in text


@pytest.mark.parametrize("family", [{"type": "batch_topk", "k": 3}, {"type": "jumprelu", "target_l0": 3.0}])
def test_thresholds_are_solved_for_on_rows_of_the_run_and_no_others(family, tmp_path):
    rows = torch.randn(1100, 8, generator=torch.Generator().manual_seed(0))
    fields = {"saes": [{"num_latents": 32, **family}], "tokens": 1024, "batch_size": 64, "shuffle_tokens": 128}
    fields |= {
        "normalization_tokens": 512,
        "calibration_tokens": 192,
        "output_dir": str(tmp_path),
        "checkpoint_every": 0,
    }
    train(RunConfig.from_dict(fields), states=iter(rows[:1024].split(64)), heldout=rows[1024:])
    record = json.loads((tmp_path / "provenance.json").read_text())
    (sae,) = record["saes"].values()
    assert sae["calibration"]["tokens"] == 192
