"""Runs on a language model some of whose hidden states are not finite: NaN wherever one of a few tokens stands."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_matryoshka_sae.activations import load_language_model
from hf_matryoshka_sae.training import Interrupted, RunConfig, train
from hf_matryoshka_sae.training.data import text as setup
from hf_matryoshka_sae.training.data.text import _token_stream
from hf_matryoshka_sae.training.run import trainer as trainer_module


RUN = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.1"],
    "context_length": 64,
    "tokens": 12 * 256,
    "batch_size": 256,
    "lm_batch_size": 8,
    "shuffle_tokens": 2048,
    "eval_tokens": 1000,
    "eval_baselines": False,
    "calibration_tokens": 1000,
    "checkpoint_every": 5,
    "log_every": 1,
    "saes": [{"type": "matryoshka", "name": "nested", "num_latents": 128, "k": 8}],
}
RARE = 11  # about 1 of 100 tokens has such an id


def config(folder, **fields):
    return RunConfig.from_dict({**RUN, "output_dir": str(folder), **fields})


def broken_at(rest):
    """Loads the language model with NaN after layer 1 at tokens whose id has the remainder `rest` by 199."""

    def load(*arguments, before=load_language_model):
        model, tokenizer = before(*arguments)
        ids = []
        model.model.embed_tokens.register_forward_pre_hook(lambda module, given: ids.__setitem__(slice(None), given))

        def spoil(module, given, output):
            bad = torch.ones_like(ids[0], dtype=torch.bool) if rest is None else ids[0] % 199 == rest
            return output.masked_fill(bad[..., None], torch.nan)

        model.model.layers[1].register_forward_hook(spoil)
        return model, tokenizer

    return load


@pytest.fixture
def spoiled(monkeypatch):
    monkeypatch.setattr(setup, "load_language_model", broken_at(RARE))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "nested" / "model.layers.1" / "model.safetensors")


def strict(path):
    """JSON as others read it."""

    def refuse(literal):
        raise AssertionError(f"{path} holds {literal}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_no_step_is_lost_and_what_is_left_out_is_counted_and_told(tmp_path, spoiled, caplog):
    (result,) = train(config(tmp_path))
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == list(range(1, 13))
    assert {line["skipped_steps"] for line in logged} == {0}
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())
    counts = [line["states_left_out"] for line in logged]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1]
    provenance, results = strict(tmp_path / "provenance.json"), strict(tmp_path / "results.json")
    assert provenance["states_left_out"] >= counts[-1]  # thresholds needed some more
    assert provenance["warnings"] == results["warnings"]
    assert any(f"{provenance['states_left_out']:,} hidden states with NaN" in text for text in results["warnings"])
    assert sum("are left out of training, " in record.message for record in caplog.records) == 1
    last = [record.message.removeprefix("[RANK 0] ") for record in caplog.records]
    assert last[-len(results["warnings"]) :] == results["warnings"]
    assert result["excluded_windows"] > 0 and result["clean_ce"] < 8
    assert any(f"{result['excluded_windows']:,} windows" in text for text in results["warnings"])


def test_the_count_is_that_of_the_tokens_read(tmp_path, monkeypatch, spoiled):
    """Counted again from the text alone, of one stream that reads nothing in a thread."""
    made = {}
    before = trainer_module.Trainer._run
    monkeypatch.setattr(trainer_module.Trainer, "_run", lambda self: made.update(it=self) or before(self))
    run = config(tmp_path, overlap=False, shuffle=False)
    train(run)
    trainer = made["it"]
    (stream,) = trainer.harvest.streams.values()
    text, bad, kept = _token_stream(run, load_language_model("embedded")[1], 0, 1), 0, 0
    while kept - bad < stream.tokens_seen + len(stream._buffer):
        batch = next(text)
        bad += int((batch.input_ids % 199 == RARE)[batch.keep].sum())
        kept += int(batch.keep.sum())
    assert stream.num_not_finite == bad > 0
    assert json.loads((tmp_path / "provenance.json").read_text())["states_left_out"] == bad


@pytest.mark.slow
def test_a_run_with_bad_states_goes_on_bit_for_bit(tmp_path, interrupt, spoiled):
    train(config(tmp_path / "whole", overlap=True))
    interrupt(7)
    with pytest.raises(Interrupted):
        train(config(tmp_path / "parts", overlap=True))
    train(config(tmp_path / "parts", overlap=False))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[key], other[key]) for key in one)
    counts = [[line["states_left_out"] for line in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert counts[0] == counts[1] and counts[0][-1] > 0
    assert (tmp_path / "whole/results.json").read_text() == (tmp_path / "parts/results.json").read_text()


def test_a_model_without_one_finite_state_ends_the_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_language_model", broken_at(None))
    with pytest.raises(
        ValueError, match=r"No hidden state of 8 forward passes in a row is finite at model.layers.1"
    ) as error:
        train(config(tmp_path))
    assert "checkpoint" not in str(error.value)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_useless_steps_without_a_checkpoint_are_not_said_to_have_one(tmp_path, monkeypatch):
    def nothing(*key):
        return torch.full((256, 128), torch.nan)

    def spoiled_step(self, step, before=trainer_module.Trainer._step):
        self.feed.rows = nothing
        return before(self, step)

    monkeypatch.setattr(trainer_module.Trainer, "_step", spoiled_step)
    with pytest.raises(ValueError, match="20 steps in a row .* there is no checkpoint yet"):
        train(config(tmp_path, tokens=40 * 256, checkpoint_every=0))


def test_a_cache_holds_finite_states_alone_and_says_so(tmp_path, spoiled, caplog):
    fields = {"activation_cache": str(tmp_path / "cache")}
    train(config(tmp_path / "run", **fields))
    shards = [load_file(path)["model.layers.1"] for path in (tmp_path / "cache").glob("shard-*.safetensors")]
    rows = torch.cat(shards)
    assert rows.isfinite().all() and len(rows) == RUN["tokens"] + RUN["calibration_tokens"]
    assert {line["skipped_steps"] for line in lines(tmp_path / "run")} == {0}
    (record,) = (tmp_path / "cache").glob("writer-*.json")
    left_out = json.loads(record.read_text())["left_out"]
    assert left_out > 0 and f"{left_out} hidden states with NaN" in caplog.text


def _one_of_two(rank, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_language_model", broken_at(RARE))
        train(config(folder, data_streams=2))


@pytest.mark.release
def test_two_processes_leave_out_what_one_does(tmp_path, spoiled, two_processes):
    two_processes.run(_one_of_two, tmp_path / "two")
    train(config(tmp_path / "one", data_streams=2))
    counts = [[line["states_left_out"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert counts[0] == counts[1] and counts[0][-1] > 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=1e-4) for key in one)
    found = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("one", "two")]
    assert found[0]["states_left_out"] == found[1]["states_left_out"]
