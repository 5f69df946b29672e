"""Runs on hidden states that are handed over: no language model, the same files, exact resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_matryoshka_sae import MatryoshkaSAE
from hf_matryoshka_sae.activations import RowTable, States, StatesStream
from hf_matryoshka_sae.training import Interrupted, RunConfig, train


D, BATCH = 16, 128
RUN = {
    "tokens": 30 * BATCH,
    "batch_size": BATCH,
    "shuffle_tokens": 1024,
    "eval_tokens": 500,
    "eval_baselines": False,
    "checkpoint_every": 10,
    "saes": [{"type": "matryoshka", "name": "nested", "num_latents": 32, "k": 4}],
}


def config(folder, **fields):
    return RunConfig.from_dict({**RUN, "output_dir": str(folder), **fields})


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D, generator=generator)
    return (torch.rand(4000, 40, generator=generator) < 0.05).float() @ directions


def weights(folder, hookpoint="states"):
    return load_file(folder / "nested" / hookpoint / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def kinds(rows):
    yield "tensor", rows
    yield "array", rows.numpy()
    yield "function", lambda: iter(rows.split(300))
    yield "iterator", iter([*rows.split(300), *rows.split(300)])
    yield "stream", StatesStream(RowTable(rows), ["states"], BATCH, 1024)


def test_every_kind_of_states_trains_without_a_language_model(tmp_path, rows):
    for kind, states in kinds(torch.cat([rows, rows.flip(0)])):
        (result,) = train(config(tmp_path / kind), states=states)
        (row,) = result["saes"]["nested"][-1:]
        assert row["fvu"] < 0.7 and row["l0"] == pytest.approx(4, rel=0.25) and row["ce"] is None, kind
    assert equal(weights(tmp_path / "tensor"), weights(tmp_path / "array"))
    sae = MatryoshkaSAE.from_pretrained(tmp_path / "tensor" / "nested" / "states")
    out = sae(rows[:500])
    spread = (rows - rows.mean(0)).square().sum(1).mean()
    assert (rows[:500] - out.reconstruction).square().sum(1).mean() < 0.7 * spread  # raw rows, no normalisation left
    record = json.loads((tmp_path / "tensor" / "provenance.json").read_text())
    assert record["language_model"] == {}


@pytest.mark.parametrize("kind", ["tensor", "function"])
def test_an_interrupted_run_on_states_ends_with_the_same_weights(tmp_path, rows, kind, interrupt):
    states = rows if kind == "tensor" else lambda: iter(torch.cat([rows, rows]).split(300))
    train(config(tmp_path / "whole"), states=states)
    interrupt(15)
    with pytest.raises(Interrupted):
        train(config(tmp_path / "parts"), states=states)
    train(config(tmp_path / "parts"), states=states)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    with pytest.raises(ValueError, match="not those with which|cannot be rewound"):
        train(config(tmp_path / "parts"), states=rows + 1 if kind == "tensor" else iter(rows.repeat(3, 1).split(300)))


def test_held_out_rows_may_be_given_and_hookpoints_name_the_states(tmp_path, rows):
    fields = {"model": "someone/lm", "hookpoints": ["layers.3"]}
    (result,) = train(config(tmp_path, **fields), states=States(rows), heldout=rows[:321])
    assert (result["hookpoint"], result["tokens"]) == ("layers.3", 321)
    about = json.loads((tmp_path / "nested" / "layers.3" / "config.json").read_text())
    assert (about["base_model"], about["hookpoint"]) == ("someone/lm", "layers.3")


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, lambda rows: {"states": States(rows, target=rows)}, "targets other than what an SAE reads"),
        ({"hookpoints": ["b"]}, lambda rows: {"states": {"a": rows}}, "no states of hookpoint 'b'"),
        ({}, lambda rows: {"states": iter(rows[:600].split(300))}, "at their end after 600 rows"),
        ({}, lambda rows: {"states": iter(rows[:300].split(300))}, "end after 300 rows.*`eval_tokens`"),
        ({"data_streams": 2}, lambda rows: {"states": iter([rows])}, "leave `data_streams`"),
        ({}, lambda rows: {"states": StatesStream(RowTable(rows), ["states"], 7, 100)}, "have 7 rows.*needs 128"),
        ({}, lambda rows: {}, "Missing fields: `model`, `dataset`.*states"),
        ({"model": "embedded", "dataset": "embedded"}, lambda rows: {}, "`hookpoints` is empty"),
        (
            {"model": "embedded", "dataset": "embedded", "hookpoints": ["model.layers.1"]},
            lambda rows: {"heldout": rows},
            "`heldout` rows go with `states`",
        ),
    ],
)
def test_states_that_do_not_fit_a_run_are_refused(tmp_path, rows, fields, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, **fields), **arguments(rows))
