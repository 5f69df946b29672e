"""Who trains what, and whose hidden states go where."""

import pytest
import torch

from hf_matryoshka_sae.training import RunConfig
from hf_matryoshka_sae.training.data.feed import EndOfStates, Feed
from hf_matryoshka_sae.training.data.placement import Placement, Processes


RUN = {"model": "embedded", "dataset": "embedded", "hookpoints": ["a", "b"], "output_dir": "x", "batch_size": 64}


def config(*saes, **fields):
    saes = [{"type": "topk", "num_latents": 64, "k": 4, **fields} for fields in saes or ({},)]
    return RunConfig.from_dict({**RUN, "saes": saes, **fields})


def test_by_default_everyone_does_everything():
    (one, other) = Processes.of(config(), 0, 4).place(config(), ["a", "b"])
    assert (one.hookpoint, other.hookpoint) == ("a", "b")
    assert (one.ranks, one.shards, one.replicas) == ((0, 1, 2, 3), 1, 4)
    assert [one.streams_of(rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]


def test_shards_of_a_replica_see_the_same_streams():
    run = config(latent_shards=2)
    (one,) = Processes.of(run, 0, 4).place(run, ["a"])
    assert [one.streams_of(rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]


def test_language_models_and_dictionaries_apart():
    run = config({}, {"processes": [3, 2], "latent_shards": 1}, lm_processes=1, latent_shards=3)
    assert Processes.of(run, 0, 4, 4).holders == (((1, 2, 3), 3), ((2, 3), 1))
    assert [Processes.of(run, rank, 4, 4).reads for rank in range(4)] == [True, False, False, False]
    assert [Processes(0, 4, 1, 4, 1, ()).owner(stream) for stream in range(4)] == [0, 0, 0, 0]
    assert [Processes(0, 4, 2, 4, 1, ()).owner(stream) for stream in range(4)] == [0, 0, 1, 1]
    assert [Processes(0, 4, 4, 2, 1, ()).owner(stream) for stream in range(2)] == [0, 2]
    assert Processes(2, 4, 4, 2, 1, ()).own_streams == [1]


@pytest.mark.parametrize(
    ("saes", "fields", "message"),
    [
        ({}, {"latent_shards": 3}, "`latent_shards: 3` must divide.*4"),
        ({"latent_shards": 0}, {}, "must divide"),
        ({"processes": [1, 4]}, {}, r"`saes.0.processes` are \[1, 4\]; the run has 0 to 3"),
        ({"processes": []}, {}, "saes.0.processes"),
        ({}, {"data_streams": 2}, "2 streams of data cannot be shared evenly by the 4 replicas"),
        ({}, {"data_streams": 6}, "`batch_size` .64. must be a multiple of streams"),
        ({}, {"lm_processes": 4}, "`lm_processes: 4` of 4 processes"),
        (
            {"type": "matryoshka", "grow_from": "x", "k": None},
            {"latent_shards": 2},
            "`grow_from` and cannot be sharded",
        ),
    ],
)
def test_what_does_not_divide_is_refused(saes, fields, message):
    run = config(saes, **fields)
    with pytest.raises(ValueError, match=message):
        Processes.of(run, 0, 4)


@pytest.mark.parametrize("fields", [{"capacity_factor": 0.5}, {"data_streams": 0}])
def test_numbers_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(**fields)


class Numbers:
    """A stream of rows that say where they come from."""

    def __init__(self, number):
        self.number, self.drawn, self.closed = number, 0, False

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return {"a": torch.full((2, 3), self.number * 100.0 + self.drawn)}

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]

    def close(self):
        self.closed = True


def feed(ahead=False, **kept):
    streams = {number: Numbers(number) for number in range(4)}
    placement = Placement(0, "a", (0,), 1, 4)
    processes = Processes(0, 1, 1, 4, 2, ())
    return Feed(streams, [placement], {"a": (3, torch.float32)}, processes, torch.device("cpu"), ahead, **kept)


def seen(one):
    return one.rows("a", (0, 1, 2, 3))[:, 0].tolist()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_is_all_streams_in_order_and_goes_on_where_it_was(ahead):
    one = feed(ahead)
    for step in range(1, 4):
        one.advance()
        assert seen(one) == [value for number in range(4) for value in [number * 100.0 + step] * 2]
        assert one.rows("a", (2,))[:, 0].tolist() == [200.0 + step] * 2
    again = feed(not ahead)  # what was on its way is not lost, nor read twice
    again.load_state_dict(one.state_dict())
    for _ in range(3):
        one.advance(), again.advance()
        assert seen(one) == seen(again)
    one.close()
    assert all(stream.closed for stream in one.streams.values())


@pytest.mark.parametrize("ahead", [False, True])
def test_kept_rows_are_of_all_batches_evenly_and_survive_a_resume(ahead):
    kept = {"keep": 4, "batches": 8}  # every other of 8 batches gives one of its two rows
    one = feed(ahead, **kept)
    for _ in range(5):
        one.advance()
    again = feed(not ahead, **kept)
    again.load_state_dict(one.state_dict())
    for whole in (one, again):
        for _ in range(3):
            whole.advance()
        assert whole.replay() == 2
        found = []
        for _ in range(2):
            whole.advance()
            found += seen(whole)
        expected = [[n * 100.0 + step for n in range(4) for step in steps] for steps in ((2, 4), (6, 8))]
        assert found == [value for batch in expected for value in batch]


def test_without_kept_rows_a_feed_reads_on():
    one = feed()
    one.advance()
    assert one.replay() == 0
    one.advance()
    assert seen(one)[0] == 2.0


def test_a_stream_that_ends_is_said():
    one = feed()
    one.streams[2].tokens_seen = 4
    one._iterators[2] = iter([])
    with pytest.raises(EndOfStates, match="at their end after 4 rows.*`tokens`"):
        one.advance()
