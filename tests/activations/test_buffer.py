import pytest
import torch

from hf_matryoshka_sae.activations import ShuffleBuffer


def _rows(start: int, count: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return {"a": ids, "b": ids.repeat(1, 2) + 0.5}


def _drain(buffer, size: int) -> list[float]:
    seen = []
    while len(buffer):
        seen += buffer.draw(size)["a"][:, 0].tolist()
    return seen


def test_each_row_is_drawn_once_in_another_order():
    buffer = ShuffleBuffer(100, seed=0)
    buffer.add(_rows(0, 60))
    buffer.add(_rows(60, 40))
    seen = _drain(buffer, 7)
    assert sorted(seen) == list(range(100)) and seen != sorted(seen)


def test_rows_stay_aligned_and_unique_through_refills():
    buffer, added, seen = ShuffleBuffer(64, seed=1), 0, []
    for round_ in range(30):
        while buffer.room >= 13:
            buffer.add(_rows(added, 13))
            added += 13
        for _ in range(1 + round_ % 4):
            rows = buffer.draw(9)
            assert torch.equal(rows["a"] + 0.5, rows["b"][:, :1])
            seen += rows["a"][:, 0].tolist()
    seen += _drain(buffer, 9)
    assert sorted(seen) == list(range(added))


def test_order_is_uniform():
    counts = torch.zeros(4, 4)
    for seed in range(2000):
        buffer = ShuffleBuffer(4, seed)
        buffer.add(_rows(0, 4))
        counts[torch.arange(4), buffer.draw(4)["a"][:, 0].long()] += 1
    assert ((counts - 500).square().sum() / 500) < 30  # chi squared, 9 degrees of freedom: p < 0.001 above 27.9


def test_peek_shows_what_draw_gives():
    buffer = ShuffleBuffer(32, seed=0)
    buffer.add(_rows(0, 32))
    buffer.draw(5)
    shown = torch.cat([rows["a"] for rows in buffer.peek(20, 6)])
    drawn = torch.cat([buffer.draw(10)["a"], buffer.draw(10)["a"]])
    assert torch.equal(shown, drawn)


@pytest.mark.parametrize("when", [0, 1, 3, 7, 11])
def test_resumed_equals_uninterrupted(when):
    def steps(buffer, first, last):
        seen = []
        for step in range(first, last):
            if buffer.room >= 10:
                buffer.add(_rows(100 * step, 10))
            if step % 3:
                seen += buffer.draw(6)["a"][:, 0].tolist()
        return seen

    whole, part = ShuffleBuffer(40, seed=5), ShuffleBuffer(40, seed=5)
    expected = steps(whole, 0, 20)
    begun = steps(part, 0, when)
    resumed = ShuffleBuffer(40, seed=99)
    resumed.load_state_dict(part.state_dict())
    assert begun + steps(resumed, when, 20) == expected


def test_errors():
    buffer = ShuffleBuffer(10, seed=0)
    with pytest.raises(ValueError, match="11 rows do not fit.*0 of at most 10"):
        buffer.add(_rows(0, 11))
    buffer.add(_rows(0, 2))
    with pytest.raises(ValueError, match="names"):
        buffer.add({"a": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="one length"):
        buffer.add({"a": torch.zeros(2, 1), "b": torch.zeros(3, 2)})
