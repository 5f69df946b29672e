"""Whole runs on the embedded language model: files, tables, resuming, mistakes."""

import errno
import json
import random
import shutil
import signal
import threading
import time
import types
from unittest.mock import Mock

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel

from hf_matryoshka_sae import MatryoshkaSAE
from hf_matryoshka_sae.evaluation.report import table
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.training import Interrupted, RunConfig, train
from hf_matryoshka_sae.training.data.text import lm_device, overlaps
from hf_matryoshka_sae.training.run import closing
from hf_matryoshka_sae.training.run import trainer as trainer_module
from hf_matryoshka_sae.training.run.trainer import Trainer, make_accelerator

from ...processes import Launch, forget_accelerator


RUN = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.1"],
    "context_length": 64,
    "tokens": 20 * 256,
    "batch_size": 256,
    "lm_batch_size": 8,
    "shuffle_tokens": 4096,
    "normalization_tokens": 2048,
    "eval_tokens": 1000,
    "eval_baselines": False,
    "calibration_tokens": 4000,
    "checkpoint_every": 5,
    "saes": [{"type": "matryoshka", "name": "nested", "num_latents": 128, "k": 8}],
}


def config(folder, **fields):
    return RunConfig.from_dict({**RUN, "output_dir": str(folder), **fields})


def weights(folder, name="nested"):
    return load_file(folder / name / "model.layers.1" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(config(folder, eval_baselines=True))


def test_a_run_leaves_its_files_and_loads_with_auto_model(finished):
    folder, results = finished
    sae = AutoModel.from_pretrained(folder / "nested" / "model.layers.1")
    assert type(sae) is MatryoshkaSAE
    assert (sae.config.base_model, sae.config.hookpoint) == ("embedded", "model.layers.1")
    assert sae.threshold.min() > 0
    assert torch.equal(sae.latent_ids, torch.arange(128))
    assert yaml.safe_load((folder / "run.yaml").read_text())["batch_size"] == 256
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    rows = results[0]["saes"]["nested"]
    assert [row["width"] for row in rows] == sae.prefix_widths
    assert json.loads((folder / "results.json").read_text())["results"] == results
    assert all(a["fvu"] > b["fvu"] for a, b in zip(rows, rows[1:], strict=False))
    assert results[0]["clean_ce"] < rows[-1]["ce"] < results[0]["zero_ce"]


def test_the_closing_report_has_baselines_on_some_of_the_tokens(finished):
    _, (result,) = finished
    nested, random = result["saes"]["nested"], result["baselines"]["random (nested)"]
    assert [row["width"] for row in random] == [nested[0]["width"], nested[-1]["width"]]
    for row, own in zip(random, (nested[0], nested[-1]), strict=True):
        assert row["l0"] == pytest.approx(own["l0"], rel=0.2) and row["fvu"] > own["fvu"]
    assert random[0]["ce"] is None and random[1]["ce"] > nested[-1]["ce"]
    components = result["baselines"]["principal components"]
    assert [row["width"] for row in components] == sorted(row["width"] for row in components)
    assert all(row["width"] < 128 for row in components) and 0 < components[-1]["fvu"] < components[0]["fvu"]
    assert 0 < result["baseline_tokens"] <= result["tokens"]
    assert "random (nested)" in table([result])


def test_the_folder_of_a_run_loads_like_a_repository_of_it(finished, tmp_path):
    folder, _ = finished
    assert equal(AutoModel.from_pretrained(folder).state_dict(), weights(folder))
    foreign = tmp_path / "config.json"
    foreign.write_text('{"model_type": "llama"}')
    closing._write_collection(tmp_path)
    assert foreign.read_text() == '{"model_type": "llama"}'


def test_metrics_are_logged_line_by_line(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    entry = lines[-1]["saes"]["nested"]
    assert set(entry) >= {"loss", "fvu", "l0", "dead", "lr"}
    assert entry["l0"] == pytest.approx(8, abs=0.1)
    assert lines[-1]["tokens_per_second"] > 0


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "activation-reader"]


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.release)])
def test_a_run_stopped_by_ctrl_c_says_how_to_go_on_and_ends_the_same(finished, tmp_path, monkeypatch, overlap):
    """Reading ahead before or after: it changes no weight."""
    threads = []

    def counted(self, step, before=trainer_module.Trainer._step):
        if len(threads) == 7:
            signal.raise_signal(signal.SIGINT)
        good = before(self, step)
        threads.append(len(readers()))
        return good

    monkeypatch.setattr(trainer_module.Trainer, "_step", counted)
    with pytest.raises(Interrupted, match=r"after step 8 of 20.*same command"):
        train(config(tmp_path, overlap=overlap, lm_device="cpu"))
    assert not readers()
    train(config(tmp_path, overlap=not overlap, lm_device="cpu"))
    assert not readers()
    assert threads == [overlap] * 8 + [not overlap] * 12
    assert equal(weights(finished[0]), weights(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_a_failing_step_leaves_no_thread(tmp_path, monkeypatch):
    def failing(self, step, before=trainer_module.Trainer._step):
        if step == 2:
            raise RuntimeError("out of memory")
        return before(self, step)

    monkeypatch.setattr(trainer_module.Trainer, "_step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config(tmp_path, overlap=True))
    assert not readers()


@pytest.mark.parametrize(
    ("device", "cores", "threads", "processes", "expected"),
    [
        ("cuda:0", 1, 1, 1, True),
        ("cpu", 1, 1, 1, False),
        ("cpu", 2, 1, 1, True),
        ("cpu", 2, 2, 1, False),
        ("cpu", 4, 8, 1, False),
        ("cpu", 4, 1, 2, True),
        ("cpu", 3, 1, 2, False),
    ],
)
def test_reading_ahead_needs_a_gpu_or_a_core(monkeypatch, device, cores, threads, processes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert overlaps(None, torch.device(device), processes) is expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert overlaps(None, torch.device(device)) is expected
    assert overlaps(True, torch.device(device)) and not overlaps(False, torch.device(device))
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert overlaps(None, torch.device(device)) is expected


@pytest.mark.parametrize("device", ["gpu0", "cuda:77", "meta"])
def test_a_language_models_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match=f"`lm_device: {device}` cannot be used"):
        train(config(tmp_path, lm_device=device))


def test_processes_do_not_share_a_language_models_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.tensor(0))  # as if it were there
    several = types.SimpleNamespace(num_processes=2, device=torch.device("cuda:1"))
    with pytest.raises(ValueError, match="all 2 processes"):
        lm_device(config(tmp_path, lm_device="cuda:0"), several)
    assert lm_device(config(tmp_path, lm_device="cpu"), several) == torch.device("cpu")
    assert lm_device(config(tmp_path), several) == several.device


@pytest.mark.release
def test_a_run_that_starts_over_goes_on_as_itself_and_leaves_the_earlier_one_whole(finished, tmp_path, interrupt):
    train(config(tmp_path / "alone", seed=1))
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)

    interrupt(3, signal.SIGTERM)
    with pytest.raises(Interrupted, match="saved .*checkpoint-00000003"):
        train(config(folder, seed=1, resume=False))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-00000003"]
    train(config(folder, seed=1))
    assert equal(weights(folder), weights(tmp_path / "alone"))
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
    (aside,) = folder.glob("before-*")
    assert equal(weights(aside), weights(finished[0]))
    with pytest.raises(ValueError, match="holds a finished run that differs in seed"):
        train(config(folder))


@pytest.mark.slow
def test_runs_share_an_activation_cache_and_a_stale_one_is_refused(finished, tmp_path):
    fields = {"activation_cache": str(tmp_path / "cache")}
    (live,), (cached,) = finished[1], train(config(tmp_path / "first", **fields))
    assert cached["saes"]["nested"][-1]["fvu"] == pytest.approx(live["saes"]["nested"][-1]["fvu"], rel=0.1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    train(config(tmp_path / "second", **fields))
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert equal(weights(tmp_path / "first"), weights(tmp_path / "second"))
    with pytest.raises(ValueError, match="context_length"):
        train(config(tmp_path / "third", context_length=32, **fields))


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision for a process; another needs a new start, and the old one back after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_in_bf16_keeps_its_weights_in_fp32(tmp_path, fresh_accelerate):
    (result,) = train(config(tmp_path, mixed_precision="bf16", gradient_accumulation_steps=2))
    assert all(tensor.dtype == torch.float32 for name, tensor in weights(tmp_path).items() if name != "latent_ids")
    assert result["saes"]["nested"][-1]["fvu"] < 0.9


def test_whoever_watches_is_told_of_each_step_and_of_what_takes_time(tmp_path):
    heard = []
    Trainer(config(tmp_path, tokens=4 * 256, checkpoint_every=2), progress=lambda *what: heard.append(what)).run()
    steps = [(1, "training"), (2, "training"), (2, "saving"), (2, "training"), (3, "training"), (4, "training")]
    assert heard == [*steps, (4, "saving"), (4, "training"), (4, "finishing")]


@pytest.mark.slow
def test_every_family_learns_from_the_same_forward_passes_and_gets_a_name(tmp_path):
    families = {"relu": {}, "batch_topk": {"k": 4}, "jumprelu": {}, "gated": {}, "topk": {"hookpoints": ["*.2:input"]}}
    saes = [{"type": kind, "num_latents": 64, "auxk_coefficient": 0.0, **fields} for kind, fields in families.items()]
    results = train(config(tmp_path, saes=saes, hookpoints=["model.layers.1", "model.layers.2:input"], tokens=2 * 256))
    assert [len(result["saes"]) for result in results] == [4, 5]
    folders = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*/model.safetensors")}
    assert len(folders) == 9 and "relu-64-l0_32/model.layers.2-input" in folders


@pytest.mark.slow
def test_training_goes_on_from_a_saved_sae(finished, tmp_path):
    before = finished[1][0]["saes"]["nested"][-1]["fvu"]
    saes = [{"type": "matryoshka", "name": "more", "lr": 1e-5}]
    for source in (finished[0], finished[0] / "nested" / "model.layers.1"):
        results = train(config(tmp_path / source.name, saes=saes, init_from=str(source), tokens=512, seed=5))
        # The folded SAE is unfolded into the new run's units: it starts where it ended.
        assert results[0]["saes"]["more"][-1]["fvu"] == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "topk"}, "of type matryoshka"),
        ({"num_latents": 64}, "has 128"),
    ],
)
def test_an_sae_that_does_not_fit_cannot_be_gone_on_from(finished, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, saes=[{"type": "matryoshka", **fields}], init_from=str(finished[0])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hookpoints": ["model.layer.1"]}, "model.layers.1"),
        ({"dataset": {"path": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"saes": [{"num_latents": 16, "k": 17}]}, "`k`"),
        ({"saes": [{"num_latents": 16, "k": 2, "prefix_widths": [8, 4, 16]}]}, "prefix_widths"),
        ({"batch_size": 255, "gradient_accumulation_steps": 2}, "multiple"),
        ({"context_length": 4096}, "context_length"),
        ({"init_from": "."}, "no SAE"),
        ({"saes": [{"num_latents": 16, "k": 2}] * 2}, "Two entries"),
        ({"saes": [{"num_latents": 16, "k": 2, "hookpoints": ["other"]}]}, "none of the run's"),
    ],
)
def test_a_mistake_is_said_before_anything_is_trained(tmp_path, fields, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", **fields))


def test_a_missing_column_and_empty_text_are_said(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "some text"}\n' * 3)
    with pytest.raises(ValueError, match="text.*body"):
        train(config(tmp_path / "run", dataset={"path": str(path)}))
    path.write_text('{"text": " "}\n' * 3)
    with pytest.raises(ValueError, match="empty|no text|no token"):
        train(config(tmp_path / "run", dataset={"path": str(path)}))


def spoil(monkeypatch, when):
    def spoiled(self, step, before=trainer_module.Trainer._step):
        def rows(*key, given=self.feed.rows):
            states = given(*key)
            if when(step):
                states = states.clone()
                states[3, 1] = torch.nan
            return states

        with monkeypatch.context() as patch:
            patch.setattr(self.feed, "rows", rows)
            return before(self, step)

    monkeypatch.setattr(trainer_module.Trainer, "_step", spoiled)


def test_a_batch_with_nan_is_skipped_and_counted(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step in (3, 4))
    train(config(tmp_path))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["skipped_steps"] == 2
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_nan_without_end_stops_the_run_with_a_message(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step >= 6)
    with pytest.raises(ValueError, match="20 steps in a row.*model.layers.1"):
        train(config(tmp_path, tokens=60 * 256))
    newest = sorted(tmp_path.glob("checkpoint-*"))[-1]
    rows = load_file(next(newest.glob("nested@*-rows-*.safetensors")))
    assert {"weights/W_dec", "optimizer/W_dec/exp_avg"} <= rows.keys()
    assert all(tensor.isfinite().all() for tensor in rows.values())


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch, finished):
    for error in (SafetensorError("No space left"), OSError(errno.ENOSPC, "No space left on device")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(SAEModel, "save_pretrained", Mock(side_effect=error))
            train(config(tmp_path))
    train(config(tmp_path))
    assert equal(weights(finished[0]), weights(tmp_path))


@pytest.mark.release
def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path):
    fields = {**RUN, "tokens": 60 * 256}
    train(RunConfig.from_dict({**fields, "output_dir": str(tmp_path / "whole")}))
    kills = 0
    for _ in range(2):
        one = Launch(tmp_path / "killed", 1, **fields)
        one.wait_for_step(1)  # a kill before the first would show nothing
        time.sleep(random.uniform(0, 2.0))
        one.all[0].kill()
        kills += one.statuses() == [-signal.SIGKILL]
    killed = Launch(tmp_path / "killed", 1, **fields).finish()
    assert kills >= 1
    assert equal(weights(tmp_path / "whole"), weights(killed))
    assert (tmp_path / "whole/results.json").read_text() == (killed / "results.json").read_text()


def test_apples_gpus_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    forget_accelerator()
    assert make_accelerator(config(tmp_path)).device.type == "cpu"  # sums are in float64, which they do not have
    forget_accelerator()
