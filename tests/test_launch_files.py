"""The files that start runs: Accelerate's own reader takes them, and shells can read the scripts."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hf_matryoshka_sae.training import load_run_config


ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PROCESSES = {"single_gpu": (1, 1), "multi_gpu": (8, 1), "multi_node": (64, 8), "cpu_gloo": (2, 1)}


def test_every_file_is_here():
    assert {path.stem for path in CONFIGS} == set(PROCESSES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path, caplog, recwarn, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines) == PROCESSES[path.stem]
    with caplog.at_level(logging.WARNING):
        arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
        arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == PROCESSES[path.stem][0]
    assert arguments.multi_gpu == (path.stem != "single_gpu") and not arguments.cpu
    assert not caplog.records and not recwarn.list
    # What is written is what is read: nothing was dropped or renamed.
    for name, value in yaml.safe_load(path.read_text()).items():
        read = getattr(config, "dynamo_config" if name == "dynamo_backend" else name)
        assert str(getattr(read, "value", read)) == ("{}" if name == "dynamo_backend" else str(value))


@pytest.mark.parametrize("path", sorted((ROOT / "examples/slurm").iterdir()), ids=lambda path: path.name)
def test_shell_reads_the_script(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize("name", ["large_sharded", "plan_16m"])
def test_examples_are_runs(name):
    config = load_run_config(ROOT / "examples" / f"{name}.yaml")
    assert config.latent_shards > 1 and config.saes[0].sae_config(4096, "", "").num_latents >= 2**20


@pytest.mark.release
def test_one_process_that_is_asked_stops_all(tmp_path):
    """What examples/slurm/train.sbatch relies on: any process takes the request, all write the checkpoint. No GPU."""
    fields = {
        "model": "embedded",
        "dataset": "embedded",
        "hookpoints": ["model.layers.0"],
        "saes": [{"type": "topk", "num_latents": 64, "k": 4}],
        "tokens": 10_000_000,
        "batch_size": 512,
        "shuffle_tokens": 16_384,
        "log_every": 1,
        "output_dir": "run",
    }
    flags = [f"--{name}={json.dumps(value)}" for name, value in fields.items()]
    with open(tmp_path / "log.txt", "w") as log:
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
        command += [str(ROOT / "accelerate_configs/cpu_gloo.yaml"), "-m", "hf_matryoshka_sae.train", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
            while not (metrics.exists() and metrics.stat().st_size):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
                time.sleep(0.5)
            children = psutil.Process(process.pid).children()
            assert len(children) == 2
            children[1].terminate()
            assert process.wait(timeout=100) != 0
        finally:
            process.kill()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()
    assert "Stopped after step" in (tmp_path / "log.txt").read_text()
