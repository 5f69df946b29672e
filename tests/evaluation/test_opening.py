"""A run's folder names model and text for an evaluation, from wherever it is asked."""

import shutil

import pytest
import yaml

from hf_matryoshka_sae.assets import embedded_lm_path
from hf_matryoshka_sae.evaluation.opening import open_saes, own_model, reachable, run_of
from hf_matryoshka_sae.models import TopKSAEConfig, build_sae


@pytest.fixture
def run(tmp_path):
    """A run in `work/runs/x`, started in `work` with paths relative to it."""
    folder = tmp_path / "work/runs/x"
    shutil.copytree(embedded_lm_path(), tmp_path / "work/lm")
    (tmp_path / "work/heldout.txt").write_text("Some text.")
    place = folder / "topk/model.layers.1"
    build_sae(
        TopKSAEConfig(d_in=128, num_latents=8, k=2, base_model="lm", hookpoint="model.layers.1")
    ).save_pretrained(place)
    fields = {
        "model": "lm",
        "dataset": {"path": "train.txt", "split": "train"},
        "eval_dataset": {"path": "heldout.txt", "split": "train", "column": "text", "name": None, "streaming": None},
        "context_length": 64,
        "exclude": "first",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    return folder


@pytest.mark.parametrize("where", ["", "topk", "topk/model.layers.1"])
def test_model_and_text_are_found_from_another_folder(run, where, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = run_of(run / where)
    assert (told.folder, told.context_length, told.exclude) == (run, 64, "first")
    assert told.model == str(tmp_path / "work/lm") and told.dataset.path == str(tmp_path / "work/heldout.txt")
    ((model, hookpoint),) = open_saes(str(run / where))[0]
    assert (model, hookpoint) == (str(tmp_path / "work/lm"), "model.layers.1")


def test_what_exists_from_here_or_is_no_path_stays(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "work")
    assert reachable("lm", run) == "lm" and reachable("some/hub-id", run) == "some/hub-id"
    told = run_of(run)
    assert own_model("another/model", told) == "another/model" and own_model("embedded", told) == "embedded"
    assert own_model("x", None) == "x"


def test_without_a_run_nothing_is_known(tmp_path):
    assert run_of(tmp_path) is None and run_of(None) is None
    (tmp_path / "run.yaml").write_text("model: [")
    assert run_of(tmp_path) is None


def test_the_embedded_text_has_a_held_out_part(run):
    fields = yaml.safe_load((run / "run.yaml").read_text())
    del fields["eval_dataset"]
    (run / "run.yaml").write_text(yaml.safe_dump(fields))
    assert run_of(run).dataset is None
    (run / "run.yaml").write_text(yaml.safe_dump({**fields, "dataset": {"path": "embedded"}}))
    assert run_of(run).dataset.split == "heldout"
