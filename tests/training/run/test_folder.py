"""Whose run is in a folder: what is gone on from, what is refused, what is moved aside."""

import json
import types
from contextlib import contextmanager

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_matryoshka_sae.training.run.folder import RunFolder, differing

from .test_trainer import config


ONE = types.SimpleNamespace(is_main_process=True, num_processes=1)
PLACE = "nested/model.layers.1"


@contextmanager
def opened(folder, **fields):
    """A run that has opened everything; what it would go on from."""
    with RunFolder(config(folder, **fields), ONE) as run:
        yield run, run.open()


def trained(folder, *steps, finished=False, **fields):
    """As after a run that has saved these steps; the run's id."""
    with opened(folder, **fields) as (run, found):
        run.claim(0 if found is None else found[0], [PLACE])
        (folder / "provenance.json").write_text(json.dumps({"run_id": run.run_id, "saes": {PLACE: {}}}))
        (folder / "metrics.jsonl").write_text("a line\n")
        for step in steps:
            generator = torch.Generator().manual_seed(run.config.seed).get_state()
            stream = {"stream": {"buffer": {"generator": generator}}}
            run.checkpoints.save(step, {"run": {"step": step, "seed": run.config.seed}, "stream-0": stream})
    if finished:
        (folder / PLACE).mkdir(parents=True)
        (folder / PLACE / "config.json").write_text("{}")
        (folder / "results.json").write_text("{}")
        (folder / "config.json").write_text('{"model_type": "sae_collection"}')
    return run.run_id


def as_an_earlier_version_wrote(folder):
    for path in folder.glob("checkpoint-*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({"step": manifest["step"], "files": manifest["files"]}))
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance.pop("run_id", None)
    (folder / "provenance.json").write_text(json.dumps(provenance))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_run_keeps_its_id_over_interruptions_and_another_has_another(tmp_path):
    one = trained(tmp_path / "one", 5)
    assert len(one) == 16 and trained(tmp_path / "one", 10) == one
    manifests = [json.loads(path.read_text()) for path in sorted((tmp_path / "one").glob("*/manifest.json"))]
    assert [(m["step"], m["run_id"], m["format_version"]) for m in manifests] == [(5, one, 1), (10, one, 1)]
    assert trained(tmp_path / "two", 5) != one


def test_starting_over_keeps_what_it_saves_and_loses_nothing(tmp_path, caplog):
    first = trained(tmp_path, 95, 100, finished=True)
    before = names(tmp_path)
    second = trained(tmp_path, 31, resume=False, seed=1)
    (aside,) = tmp_path.glob("before-*")
    assert names(aside) == before and (aside / PLACE / "config.json").is_file()
    assert f"is in {aside} now" in caplog.text and first != second
    assert names(tmp_path) == [aside.name, "checkpoint-00000031", "metrics.jsonl", "provenance.json", "run.yaml"]
    with opened(tmp_path, seed=1) as (run, (step, checkpoint)):
        assert (step, checkpoint.tree("run")["seed"], run.run_id) == (31, 1, second)
    with opened(aside) as (run, (step, checkpoint)):  # a whole run as before
        assert (step, checkpoint.tree("run")["seed"], run.run_id) == (100, 0, first)


def test_an_sae_that_a_run_begins_with_stays_where_it_is_named(tmp_path):
    trained(tmp_path, 20, finished=True)
    grown = [{"type": "matryoshka", "name": "grown", "grow_from": str(tmp_path), "num_latents": 256}]
    with opened(tmp_path, resume=False, saes=grown) as (run, _):
        run.claim(0, ["grown/model.layers.1"])
    assert (tmp_path / PLACE / "config.json").is_file()
    assert [path.name for path in tmp_path.glob("before-*/checkpoint-*")] == ["checkpoint-00000020"]


def test_starting_over_twice_within_a_second_keeps_both(tmp_path):
    for _ in range(3):
        trained(tmp_path, 5, resume=False)
    assert len(list(tmp_path.glob("before-*/checkpoint-00000005"))) == 2


def test_weights_of_one_seed_are_never_gone_on_from_under_another(tmp_path):
    trained(tmp_path, 5)
    fields = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**fields, "seed": 1}))  # which an earlier version left so
    with pytest.raises(ValueError, match=r"differs in seed \(0 there, 1 here\)"), opened(tmp_path, seed=1):
        pass


def test_another_seeds_weights_that_an_earlier_version_left_are_refused(tmp_path):
    trained(tmp_path, 100)
    as_an_earlier_version_wrote(tmp_path)
    fields = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**fields, "seed": 1}))
    with pytest.raises(ValueError, match="was made with seed 0, not 1"), opened(tmp_path, seed=1):
        pass


def test_checkpoints_of_another_run_are_not_gone_on_from_nor_removed(tmp_path, caplog):
    trained(tmp_path / "other", 10)
    trained(tmp_path / "run", 5)
    (tmp_path / "other/checkpoint-00000010").rename(tmp_path / "run/checkpoint-00000010")
    with opened(tmp_path / "run") as (run, (step, _)):
        assert step == 5
        run.claim(5, [PLACE])
        for step in (8, 10, 12):
            run.checkpoints.save(step, {"run": {}})
    (moved,) = (tmp_path / "run").glob("before-*/*")
    assert moved.name == "checkpoint-00000010" and str(moved.parent) in caplog.text
    for step in (10, 12):
        (tmp_path / f"run/checkpoint-{step:08d}").rename(tmp_path / f"kept-{step}")
    moved.rename(tmp_path / "run/checkpoint-00000010")
    with pytest.raises(ValueError, match="checkpoint-00000010 is of another run"), opened(tmp_path / "run"):
        pass


def test_what_an_earlier_version_wrote_is_gone_on_from(tmp_path):
    trained(tmp_path, 5, 10)
    as_an_earlier_version_wrote(tmp_path)
    with opened(tmp_path) as (run, (step, _)):
        assert step == 10 and len(run.run_id) == 16
        run.claim(step, [PLACE])
        run.checkpoints.save(15, {"run": {}})
    assert names(tmp_path)[:2] == ["checkpoint-00000010", "checkpoint-00000015"]
    as_an_earlier_version_wrote(tmp_path)
    with pytest.raises(ValueError, match="differs in batch_size"), opened(tmp_path, batch_size=512):
        pass


def test_a_checkpoint_of_a_later_version_is_refused_and_stays(tmp_path):
    trained(tmp_path, 5)
    path = tmp_path / "checkpoint-00000005" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2; this version of hf_matryoshka_sae reads 1"):
        with opened(tmp_path):
            pass


@pytest.mark.parametrize("finished", [True, False])
def test_an_unfinished_run_is_called_so_and_a_finished_one_is_not(tmp_path, finished):
    trained(tmp_path, *((15, 20) if finished else (5,)), finished=finished)
    with pytest.raises(ValueError, match=f"holds {'a finished' if finished else 'an unfinished'} run that differs"):
        with opened(tmp_path, seed=1):
            pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": {"path": "nowhere.jsonl"}}, "data set 'nowhere.jsonl' does not exist"),
        ({"eval_dataset": {"path": "./nowhere"}}, "data set 'nowhere' does not exist"),
        ({"model": "./nowhere"}, "no folder ./nowhere with a language model"),
    ],
)
def test_a_wrong_path_is_the_mistake_not_that_the_run_is_another(tmp_path, fields, message):
    trained(tmp_path, 5)
    with pytest.raises(ValueError, match=message), opened(tmp_path, **fields):
        pass


def test_a_run_that_never_took_a_step_claims_nothing_and_moves_nothing(tmp_path):
    trained(tmp_path, 20, finished=True)
    before = names(tmp_path)
    with opened(tmp_path, resume=False, seed=1):
        pass  # as where the language model could not be loaded
    assert names(tmp_path) == before
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["seed"] == 0


def test_a_run_killed_before_its_first_checkpoint_leaves_nothing_to_move(tmp_path):
    trained(tmp_path)
    trained(tmp_path, seed=1)
    assert names(tmp_path) == ["metrics.jsonl", "provenance.json", "run.yaml"]


def test_without_a_whole_checkpoint_a_run_starts_and_keeps_the_broken_ones(tmp_path):
    trained(tmp_path, 5)
    (tmp_path / "checkpoint-00000005" / "run.safetensors").write_bytes(b"")
    trained(tmp_path, 5)
    assert len(list(tmp_path.glob("before-*/checkpoint-00000005"))) == 1
    assert load_file(tmp_path / "checkpoint-00000005" / "run.safetensors") == {}


def test_what_killed_saves_left_is_removed_at_the_start(tmp_path):
    trained(tmp_path, 20, finished=True)
    litter = [".checkpoint-00000025.tmp", ".checkpoint-00000025-01ab23cd.tmp", f"{PLACE}/.saving-x1"]
    for name in litter:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"0" * 100)
    (tmp_path / ".checkpoint-00000026.tmp").write_text("a file, and no one knows whose")
    with opened(tmp_path) as (_, (step, _)):
        assert step == 20 and not any((tmp_path / name).exists() for name in litter)
    assert (tmp_path / ".checkpoint-00000026.tmp").is_file()


def test_fields_that_an_earlier_version_did_not_have_count_as_their_defaults(tmp_path):
    fields = config(tmp_path).to_dict()
    before = {name: value for name, value in fields.items() if name != "max_norm_factor"}
    before["saes"] = [{name: value for name, value in fields["saes"][0].items() if name != "ema_decay"}]
    before["dataset"] = {name: value for name, value in fields["dataset"].items() if name != "source_column"}
    assert differing(before, fields) == []
    assert differing(before, fields | {"max_norm_factor": 5.0}) == ["max_norm_factor"]
