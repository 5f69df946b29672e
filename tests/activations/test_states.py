"""Hidden states that are there already: which rows come, in what order, and from where a stream goes on."""

import pytest
import torch
from datasets import Dataset

from hf_matryoshka_sae.activations import (
    CachedActivationStream,
    PrefetchedStream,
    RowStream,
    RowTable,
    States,
    StatesStream,
    target_of,
)


N, D, BATCH = 96, 3, 8


def numbered(count=N):
    """Rows that say which they are."""
    return torch.arange(count, dtype=torch.float32)[:, None].expand(count, D).contiguous()


def table(kind):
    rows = numbered()
    return RowTable(Dataset.from_dict({"states": rows.tolist()}) if kind == "dataset" else rows)


def stream(states, **options):
    return StatesStream(states, ["states"], BATCH, 4 * BATCH, **options)


def drawn(one, batches):
    return torch.cat([next(one)["states"][:, 0] for _ in range(batches)]).long().tolist()


@pytest.mark.parametrize("kind", ["tensor", "dataset"])
def test_each_epoch_has_every_row_once_in_another_order(kind):
    one = StatesStream(table(kind), ["states"], N, 2 * N)
    first, second = drawn(one, 1), drawn(one, 1)
    assert sorted(first + second) == sorted([*range(N)] * 2)
    assert first != sorted(first) and first != second


def test_readers_share_the_rows():
    parts = [StatesStream(table("tensor"), ["states"], N // 2, N // 2 * 2, rank=r, world_size=2) for r in range(2)]
    seen = [set(one._source.read(N)["states"][:, 0].long().tolist()) for one in parts]
    assert seen[0] | seen[1] == set(range(N)) and not seen[0] & seen[1]


@pytest.mark.parametrize("ahead", [False, True], ids=["plain", "read ahead"])
@pytest.mark.parametrize("kind", ["tensor", "dataset", "function"])
def test_a_stream_goes_on_where_its_state_was_taken(kind, ahead):
    def fresh():
        states = table(kind) if kind != "function" else lambda: iter(numbered(400).split(30))
        return PrefetchedStream(stream(states)) if ahead else stream(states)

    one, again = fresh(), fresh()
    drawn(one, 5)
    again.load_state_dict(one.state_dict())
    assert drawn(one, 20) == drawn(again, 20)
    one.close(), again.close()


def test_an_iterator_cannot_be_rewound_and_says_so():
    one, again = (stream(iter(numbered(400).split(30))) for _ in range(2))
    drawn(one, 3)
    with pytest.raises(ValueError, match="cannot be rewound.*function that makes the iterator anew"):
        again.load_state_dict(one.state_dict())


def test_other_states_than_those_begun_with_are_refused():
    one, other = stream(table("tensor")), stream(RowTable(numbered() + 1))
    with pytest.raises(ValueError, match="not those with which the run began"):
        other.load_state_dict(one.state_dict())


def test_targets_stay_beside_their_rows_and_masked_rows_stay_out():
    rows = numbered()
    states = RowTable(States(rows, target=-rows, mask=torch.arange(N) % 3 == 0))
    one = stream(states)
    for _ in range(20):
        batch = next(one)
        assert torch.equal(batch["states"], -batch[target_of("states")])
        assert (batch["states"] % 3 == 0).all()
    masked = stream(iter([States(rows, mask=torch.arange(N) < 50)]))
    assert set(drawn(masked, 6)) <= set(range(50))


def test_rows_that_are_not_finite_are_left_out_and_counted():
    rows = numbered()
    rows[::4] = torch.nan
    one = PrefetchedStream(StatesStream(RowTable(rows), ["states"], BATCH, 2 * N))
    assert not set(drawn(one, 5)) & set(range(0, N, 4))
    assert one.num_not_finite > 0
    one.close()


def test_held_out_rows_are_no_training_rows():
    training, heldout = table("tensor").split(10, seed=3)
    held = set(torch.cat(list(heldout.batches("states")))[:, 0].tolist())
    assert len(heldout) == len(held) == 10 and len(training) == N - 10
    assert not held & set(torch.cat(list(training.batches("states")))[:, 0].tolist())
    shares = [torch.cat(list(heldout.batches("states", rank, 3))) for rank in range(3)]
    assert sum(map(len, shares)) == 10


@pytest.mark.parametrize(
    ("states", "hookpoints", "message"),
    [
        (torch.zeros(4), [], "must be .N, D."),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(5, 2)}, [], "all of one length"),
        ({"a": torch.zeros(4, 2)}, ["b"], "no states of hookpoint 'b'; given are a"),
        (torch.zeros(4, 2), ["a", "b"], "must be given by name"),
        (States(torch.zeros(4, 2), mask=torch.zeros(4)), [], "all rows are masked"),
        (Dataset.from_dict({"x": [[1.0]]}), ["a"], "no column 'states' of states; it has x"),
    ],
)
def test_states_that_do_not_fit_are_named(states, hookpoints, message):
    with pytest.raises(ValueError, match=message):
        RowTable(states, hookpoints)


def test_every_stream_keeps_the_protocol():
    one = stream(table("tensor"))
    assert isinstance(one, RowStream) and isinstance(PrefetchedStream(one), RowStream)
    assert all(hasattr(CachedActivationStream, name) for name in ("peek", "state_dict", "load_state_dict", "close"))
