"""Whole sweeps on the embedded language model: files, resuming, processes, failures."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_matryoshka_sae import cli
from hf_matryoshka_sae.common.command import Interrupted
from hf_matryoshka_sae.studies.scaling import running
from hf_matryoshka_sae.studies.scaling.config import load_sweep
from hf_matryoshka_sae.studies.scaling.plan import plan_runs
from hf_matryoshka_sae.studies.scaling.points import read_points
from hf_matryoshka_sae.training import load_run_config, train
from hf_matryoshka_sae.training.run import trainer as trainer_module


SWEEP = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.1"],
    "context_length": 64,
    "batch_size": 256,
    "lm_batch_size": 8,
    "shuffle_tokens": 4096,
    "normalization_tokens": 2048,
    "eval_tokens": 250,
    "calibration_tokens": 1000,
    "checkpoint_every": 2,
    "log_every": 2,
    "sweep": {"num_latents": [32, 64, 128], "k": [2, 4, 8], "tokens": [1024, 2048], "hold_out": [[64, 4]]},
}


TRAIN_RUN = """
import sys
from hf_matryoshka_sae.studies.scaling.running import train_runs
from hf_matryoshka_sae.training import load_run_config
train_runs([load_run_config(sys.argv[1])], processes=2)
"""


def write(folder, **changes):
    """The sweep's YAML in a folder, and the folder of its results."""
    grid = {**SWEEP["sweep"], **changes.pop("sweep", {})}
    fields = {**SWEEP, **changes, "output_dir": str(folder / "out"), "sweep": grid}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(fields))
    return str(folder / "sweep.yaml"), folder / "out"


def sweep(folder, *flags, **changes):
    path, _ = write(folder, **changes)
    return cli.main(["sweep", "--config", path, "--resamples", "0", *flags])


def weights(folder):
    return {
        path.relative_to(folder).parts[-3]: load_file(path)
        for path in sorted(folder.rglob("model.safetensors"))
        if "checkpoint" not in str(path)
    }


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name][key], other[name][key]) for name in one for key in one[name]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results of a sweep that was stopped in its second budget and called again."""
    folder, steps = tmp_path_factory.mktemp("sweep"), []

    def counted(self, step, before=trainer_module.Trainer._step):
        steps.append((self.config.tokens, step))
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)
        return before(self, step)

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as errors:
        patch.setattr(trainer_module.Trainer, "_step", counted)
        assert sweep(folder) == 130
        assert "Run the same command again" in errors.getvalue()
        assert sweep(folder, "--fit_only") == 0  # the first budget is done
        assert len(read_points(folder / "out" / "sweep.csv")) == 9
        assert sweep(folder) == 0
    assert steps == [(1024, step) for step in range(4)] + [(2048, step) for step in range(8)]
    return folder / "out"


def test_a_sweep_leaves_its_runs_its_points_and_its_report(finished):
    there = "report.md scaling.png sweep.csv sweep.json tokens-1024 tokens-2048"  # the cache of hidden states is gone
    assert sorted(path.name for path in finished.iterdir()) == there.split()
    points = read_points(finished / "sweep.csv")
    assert [(p.tokens, p.k, p.num_latents) for p in points] == [
        (tokens, k, size) for tokens in (1024, 2048) for k in (2, 4, 8) for size in (32, 64, 128)
    ]
    assert [(p.num_latents, p.k) for p in points if p.held_out] == [(64, 4)] * 2
    d_in = 128
    assert points[0].flops == 1024 * d_in * (2 * 32 + 8 * 2)
    (result,) = json.loads((finished / "tokens-2048" / "results.json").read_text())["results"]
    (row,) = result["saes"]["topk-64-k4"]
    (point,) = (p for p in points if (p.tokens, p.num_latents, p.k) == (2048, 64, 4))
    assert (point.loss, point.ce, point.l0) == (row["fvu"], row["ce"], row["l0"])
    report = json.loads((finished / "sweep.json").read_text())
    assert [budget["joint"]["points"] for budget in report["budgets"]] == [8, 8]
    assert report["budgets"][1]["held_out"].keys() >= {"joint", "nearest", "mean"}


@pytest.mark.slow
def test_an_sae_is_the_one_that_an_uninterrupted_run_of_its_spec_trains(finished, tmp_path):
    run = load_run_config(finished / "tokens-2048" / "run.yaml")
    run.output_dir, run.activation_cache, run.saes = str(tmp_path), str(tmp_path / "cache"), run.saes[:1]
    train(run)
    (name,) = weights(tmp_path)
    assert equal(weights(tmp_path), {name: weights(finished / "tokens-2048")[name]})


def test_a_finished_sweep_trains_nothing_again(finished, monkeypatch):
    monkeypatch.setattr(running, "train", lambda run: pytest.fail("trained again"))
    before = (finished / "sweep.csv").read_text()
    assert sweep(finished.parent) == 0
    assert (finished / "sweep.csv").read_text() == before


@pytest.mark.slow
def test_a_larger_grid_trains_only_what_is_new(finished, monkeypatch):
    trained = []
    monkeypatch.setattr(running, "train_runs", lambda runs, processes: trained.extend(runs))
    assert sweep(finished.parent, sweep={"k": [2, 4, 8, 16]}) == 0
    assert [[spec.name for spec in run.saes] for run in trained] == [
        [f"topk-{size}-k16" for size in (32, 64, 128)] for _ in range(2)
    ]
    for run in trained:  # planned, so on the disk
        (finished / run.output_dir / "run.yaml").unlink()


def test_nothing_finished_is_said(tmp_path, capsys):
    assert sweep(tmp_path, "--fit_only") == 2
    assert "holds no finished run of this sweep" in capsys.readouterr().err
    assert sweep(tmp_path, "--processes", "0") == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_a_message(tmp_path, capsys):
    (tmp_path / "out").touch()
    assert sweep(tmp_path) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.release
def test_processes_train_what_one_trains(tmp_path):
    grid = {"num_latents": [32, 64, 128, 256], "k": [4], "tokens": [1024], "hold_out": 0.0}
    assert sweep(tmp_path, "--processes", "2", sweep=grid) == 0
    points = read_points(tmp_path / "out" / "sweep.csv")
    assert [(p.num_latents, p.k, p.tokens) for p in points] == [(size, 4, 1024) for size in grid["num_latents"]]
    folders = sorted(path.parent.name for path in (tmp_path / "out").glob("*/log.txt"))
    assert folders == ["tokens-1024", "tokens-1024-2"]
    run = load_run_config(tmp_path / "out" / "tokens-1024" / "run.yaml")
    run.output_dir, run.activation_cache = str(tmp_path / "alone"), str(tmp_path / "cache")
    train(run)
    assert equal(weights(tmp_path / "out" / "tokens-1024"), weights(tmp_path / "alone"))


def planned(folder):
    """Two runs that share no cache."""
    runs = plan_runs(load_sweep(write(folder)[0]))
    for run in runs:
        run.activation_cache = None
    return runs


def idle(run, slot, processes):
    """In the place of a run's process: one that does nothing until it is told to end."""
    return subprocess.Popen(["sleep", "600"])


@pytest.mark.release
def test_a_failing_run_stops_the_others_and_its_message_is_shown(tmp_path, monkeypatch):
    runs = planned(tmp_path)
    broken = tmp_path / "out" / "tokens-1024" / "run.yaml"
    broken.write_text(broken.read_text().replace("model: embedded", "model: not/there"))
    start, others = running._start, []

    def started(run, slot, processes):
        if run.tokens == 1024:
            return start(run, slot, processes)
        others.append(idle(run, slot, processes))
        return others[-1]

    monkeypatch.setattr(running, "_start", started)
    with pytest.raises(
        ValueError, match=r"(?s)tokens-1024 ended with status 2.*error: The language model 'not/there'"
    ):
        running.train_runs(runs, 2)
    assert [other.returncode for other in others] == [-signal.SIGTERM]


def test_a_termination_request_is_passed_on_to_the_processes(tmp_path, monkeypatch):
    started, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(running, "_start", lambda *arguments: started.append(idle(*arguments)) or started[-1])
    monkeypatch.setattr(running.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="Run the same command again"):
        running.train_runs(planned(tmp_path), 2)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.release
def test_a_process_whose_parent_is_killed_ends_with_a_checkpoint(tmp_path):
    path, folder = write(tmp_path, sweep={"tokens": [128_000]}, checkpoint_every=20)
    plan_runs(load_sweep(path))
    folder = folder / "tokens-128000"
    parent = subprocess.Popen([sys.executable, "-c", TRAIN_RUN, str(folder / "run.yaml")])
    log, text = folder / "metrics.jsonl", folder / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while not (stopped := re.findall(r"Stopped after step (\d+)", text.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    (step,) = map(int, stopped)
    assert 0 < step < 500 and step == max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert not (folder / "results.json").exists()
