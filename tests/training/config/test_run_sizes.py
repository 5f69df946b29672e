"""How much a run reads for its normalisation and thresholds: a share of it, unless it says otherwise."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_matryoshka_sae.activations import load_language_model
from hf_matryoshka_sae.planning.workload import read_workload
from hf_matryoshka_sae.training import Interrupted, RunConfig, train
from hf_matryoshka_sae.training.config.run import (
    as_begun,
    calibration_tokens,
    eval_tokens,
    normalization_tokens,
    shuffle_tokens,
    window_pool_tokens,
)
from hf_matryoshka_sae.training.data import text as setup
from hf_matryoshka_sae.training.run import trainer as trainer_module
from hf_matryoshka_sae.training.run.closing import Closing


RUN = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.1"],
    "context_length": 64,
    "tokens": 12 * 256,
    "batch_size": 256,
    "lm_batch_size": 8,
    "checkpoint_every": 5,
    "saes": [{"type": "batch_topk", "name": "it", "num_latents": 64, "k": 8}],
}
EARLIER = {
    "normalization_tokens": 65_536,
    "calibration_tokens": 200_000,
    "eval_tokens": 60_000,
    "shuffle_tokens": 131_072,
    "window_pool_tokens": 4_000_000,
}


def config(folder="unused", **fields):
    return RunConfig.from_dict({**RUN, "output_dir": str(folder), **fields})


def sizes(run, streams=1):
    measured = normalization_tokens(run), calibration_tokens(run), eval_tokens(run)
    return *measured, shuffle_tokens(run, streams), window_pool_tokens(run, streams)


def test_long_runs_read_what_they_always_did_and_short_ones_a_share():
    long = {**EARLIER, "calibration_tokens": 32_768}
    assert sizes(config(tokens=10**9)) == sizes(config(tokens=10**6)) == tuple(long.values())
    assert sizes(config(tokens=40_000)) == (5000, 8000, 10_000, 10_000, 320_000)
    assert sizes(config(tokens=40_000), streams=2)[3:] == (5000, 160_000)
    assert sizes(config(tokens=300)) == (4096,) * 5


@pytest.mark.parametrize("tokens", [300, 10**7])
def test_what_a_run_says_is_what_it_reads(tokens):
    given = {name: number for number, name in enumerate(EARLIER, 11)}
    assert sizes(config(tokens=tokens, **given), streams=4) == (11, 12, 13, 14, 15)
    assert sizes(config(tokens=tokens, **EARLIER), streams=4) == tuple(EARLIER.values())


def test_a_short_run_reads_little_more_than_it_trains_on_and_shows_it(tmp_path, monkeypatch, capsys):
    read = []
    monkeypatch.setattr(setup, "load_language_model", lambda *given: _counting(load_language_model(*given), read))
    monkeypatch.setattr(trainer_module, "Closing", _NoEvaluation)
    train(config(tmp_path, tokens=80 * 256, overlap=False))
    assert 80 * 256 < sum(read) < 1.6 * 80 * 256  # whole forward passes, of which special tokens are left out
    shown = capsys.readouterr().err
    assert "first hidden states" in shown and "states for the thresholds" in shown


class _NoEvaluation(Closing):
    """Solves for the threshold and ends."""

    def run(self, feed, folder, skipped):
        self._calibration(feed)
        return [], []


def _counting(loaded, read):
    loaded[0].model.embed_tokens.register_forward_hook(lambda module, given, output: read.append(given[0].numel()))
    return loaded


@pytest.mark.release
def test_a_run_begun_with_sizes_in_its_file_goes_on_with_them(tmp_path, interrupt):
    given = {"normalization_tokens": 3000, "calibration_tokens": 1500, "eval_tokens": 1000, "shuffle_tokens": 6000}
    given["window_pool_tokens"] = 20_000
    train(config(tmp_path / "whole", **given))
    steps = interrupt(7)
    with pytest.raises(Interrupted):
        train(config(tmp_path / "parts", **given))
    train(config(tmp_path / "parts"))
    assert steps == list(range(12))
    one, other = (load_file(tmp_path / name / "it/model.layers.1/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="differs in shuffle_tokens"):
        train(config(tmp_path / "parts", shuffle_tokens=7000))


def test_the_sizes_of_a_file_count_only_where_a_run_goes_on(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, **EARLIER}))
    assert sizes(as_begun(config(tmp_path))) != tuple(EARLIER.values())
    (tmp_path / "checkpoint-00000005").mkdir()
    assert sizes(as_begun(config(tmp_path))) == tuple(EARLIER.values())
    assert sizes(as_begun(config(tmp_path, resume=False))) != tuple(EARLIER.values())
    assert as_begun(config(tmp_path, calibration_tokens=7)).calibration_tokens == 7
    (tmp_path / "run.yaml").write_text("[]")
    assert sizes(as_begun(config(tmp_path))) != tuple(EARLIER.values())


def test_a_plan_counts_the_buffer_that_the_run_will_have():
    assert read_workload(config(tokens=40_000)).buffer_tokens == 10_000
    assert read_workload(config(tokens=40_000, **EARLIER)).buffer_tokens == 131_072
