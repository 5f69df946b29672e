"""Whole runs whose latents are sharded: the files of one process, whoever dies on the way and however many go on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file


RUN = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.1"],
    "context_length": 64,
    "tokens": 16 * 256,
    "batch_size": 256,
    "lm_batch_size": 8,
    "shuffle_tokens": 2048,
    "normalization_tokens": 2048,
    "eval_tokens": 1000,
    "calibration_tokens": 4000,
    "checkpoint_every": 4,
    "log_every": 1,
    "data_streams": 4,
    "overlap": False,
    "saes": [
        {"type": "matryoshka", "name": "nested", "num_latents": 128, "k": 8, "sort_every": 3},
        {"type": "topk", "name": "topk", "num_latents": 131, "k": 8},
    ],
}
NAMES = ("nested", "topk")


class Processes:
    """The processes of a run, without a launcher that would end the others when one dies."""

    def __init__(self, folder, count, **fields):
        folder.mkdir(exist_ok=True)
        self.run = folder / "run"
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump({**RUN, "output_dir": str(self.run), **fields}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "hf_matryoshka_sae.train", "--config", str(path)]
        common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        self.all = []
        for rank in range(count):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(folder / f"log-{rank}", "w") as log:
                self.all.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        self.logs = [folder / f"log-{rank}" for rank in range(count)]

    def finish(self):
        assert [process.wait(400) for process in self.all] == [0] * len(self.all), self.logs[0].read_text()[-3000:]
        return self.run

    def wait_for_step(self, step):
        metrics = self.run / "metrics.jsonl"
        while not metrics.exists() or sum(1 for _ in metrics.open()) < step:
            assert self.all[0].poll() is None, self.logs[0].read_text()[-3000:]
            time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("alone"), 1).finish()


def tensors(run, name):
    return load_file(run / name / "model.layers.1" / "model.safetensors")


def assert_same_run(run, alone):
    for name in NAMES:
        found, expected = tensors(run, name), tensors(alone, name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            scale = value.abs().max().clamp(min=1) if value.is_floating_point() else 1
            assert ((found[key] - value).abs() / scale).max() <= 1e-5, (name, key)
        place = f"{name}/model.layers.1/config.json"
        assert json.loads((run / place).read_text()) == json.loads((alone / place).read_text())
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (run, alone)]
    assert len(lines[0]) == len(lines[1]) == 16
    for one, other in zip(*lines, strict=True):
        for name in NAMES:
            assert one["saes"][name]["fvu"] == pytest.approx(other["saes"][name]["fvu"], rel=1e-5)
            assert one["saes"][name]["loss"] == pytest.approx(other["saes"][name]["loss"], rel=1e-5, abs=1e-5)
    results = [json.loads((folder / "results.json").read_text())["results"][0] for folder in (run, alone)]
    for name in NAMES:
        for row, expected in zip(results[0]["saes"][name], results[1]["saes"][name], strict=True):
            for key in ("width", "l0", "dead", "fvu", "ce", "recaptured_zero"):
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


@pytest.mark.slow
def test_two_shards_give_the_run_of_one_process(alone, tmp_path):
    assert_same_run(Processes(tmp_path, 2, latent_shards=2).finish(), alone)


@pytest.mark.slow
def test_language_model_and_shards_on_different_processes_give_the_run_of_one(alone, tmp_path):
    assert_same_run(Processes(tmp_path, 3, latent_shards=2, lm_processes=1).finish(), alone)


@pytest.mark.slow
def test_dictionaries_on_different_processes_give_the_run_of_one(alone, tmp_path):
    saes = [{**entry, "processes": [rank]} for rank, entry in enumerate(RUN["saes"])]
    assert_same_run(Processes(tmp_path, 2, saes=saes).finish(), alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_everywhere_and_half_as_many_go_on(alone, tmp_path):
    before = Processes(tmp_path, 4, latent_shards=2)
    before.wait_for_step(9)
    before.all[2].send_signal(signal.SIGKILL)
    began = time.monotonic()
    statuses = [process.wait(60) for process in before.all]
    assert time.monotonic() - began < 60
    assert [status != 0 for status in statuses] == [True] * 4
    for rank in (0, 1, 3):
        said = before.logs[rank].read_text()
        assert "Process 2 of 4" in said and "killed" in said, said[-2000:]
        assert "The last checkpoint is" in said and "run the same command again" in said
    assert (before.run / "checkpoint-00000008").is_dir()
    after = Processes(tmp_path, 2, latent_shards=2)
    assert_same_run(after.finish(), alone)
    assert "Going on from step" in after.logs[0].read_text()
