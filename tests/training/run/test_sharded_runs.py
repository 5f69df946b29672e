"""Whole runs whose latents are sharded: the files of one process, whoever dies on the way and however many go on."""

import json

import pytest
from safetensors.torch import load_file

from ...processes import Launch


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
    "eval_baselines": False,
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Launch(tmp_path_factory.mktemp("alone"), 1, **RUN).finish()


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


@pytest.mark.release
def test_two_shards_give_the_run_of_one_process(alone, tmp_path):
    assert_same_run(Launch(tmp_path, 2, **RUN, latent_shards=2).finish(), alone)


@pytest.mark.release
def test_language_model_and_shards_on_different_processes_give_the_run_of_one(alone, tmp_path):
    assert_same_run(Launch(tmp_path, 3, **RUN, latent_shards=2, lm_processes=1).finish(), alone)


@pytest.mark.release
def test_dictionaries_on_different_processes_give_the_run_of_one(alone, tmp_path):
    saes = [{**entry, "processes": [rank]} for rank, entry in enumerate(RUN["saes"])]
    assert_same_run(Launch(tmp_path, 2, **{**RUN, "saes": saes}).finish(), alone)


@pytest.mark.release
def test_a_killed_process_ends_the_run_everywhere_and_half_as_many_go_on(alone, tmp_path):
    before = Launch(tmp_path, 4, **RUN, latent_shards=2)
    before.wait_for_step(9)
    before.all[2].kill()
    assert all(before.statuses(60))
    for rank in (0, 1, 3):
        said = before.logs[rank].read_text()
        assert "Process 2 of 4" in said and "killed" in said, said[-2000:]
        assert "The last checkpoint is" in said and "run the same command again" in said
    assert (before.run / "checkpoint-00000008").is_dir()
    after = Launch(tmp_path, 2, **RUN, latent_shards=2)
    assert_same_run(after.finish(), alone)
    assert "Going on from step" in after.logs[0].read_text()
