import pytest
import torch

from hf_matryoshka_sae.activations import Split, TokenStream, WindowShuffle
from hf_matryoshka_sae.activations.text.documents import IndexedDocuments

from ..tiny import tokenizer


WORDS = 3000
S, B = 8, 4


def stream(**options):
    """One long document of words that each occur once, so that a window tells where it comes from."""
    documents = [" ".join(f"w{i}" for i in range(start, start + 100)) for start in range(0, WORDS, 100)]
    return TokenStream(documents, tokenizer(words=WORDS), S, B, **options)


def shuffled(pool=1600, seed=0):
    return WindowShuffle(stream(), pool, seed)


def test_windows_are_those_of_the_stream_each_once():
    plain, mixed = stream(), shuffled()
    read = {tuple(row) for _ in range(60) for row in next(plain).input_ids.tolist()}
    drawn = [tuple(row) for _ in range(10) for row in next(mixed).input_ids.tolist()]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= read


def test_windows_of_a_batch_come_from_all_over_the_pool():
    mixed = shuffled()
    starts = torch.cat([next(mixed).input_ids[:, 2].float() for _ in range(20)])
    in_order = torch.cat([next(s).input_ids[:, 2].float() for s in [stream()] for _ in range(20)])
    assert starts.std() > 1.5 * in_order.std()


def test_the_pool_is_at_most_one_epoch():
    mixed = shuffled(pool=10**9)
    next(mixed)
    assert mixed._ids.numel() <= 1.2 * (WORDS + WORDS // S + 100)


@pytest.mark.parametrize("batches", [0, 1, 30])
def test_resuming_goes_on_bit_for_bit(batches):
    one, other = shuffled(), shuffled()
    for _ in range(batches):
        next(one)
    other.load_state_dict(one.state_dict())
    for _ in range(20):
        a, b = next(one), next(other)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.keep, b.keep)


def test_kept_positions_move_with_their_windows():
    mixed = shuffled()
    for _ in range(20):
        batch = next(mixed)
        assert not batch.keep[:, 0].any()
        assert batch.keep[:, 1:].float().mean() > 0.8


def test_a_finite_stream_is_refused():
    with pytest.raises(ValueError, match="endless"):
        WindowShuffle(stream(num_epochs=1), 100, 0)


def test_the_two_sides_of_a_split_are_disjoint_and_everything():
    texts = [f"document {i}" for i in range(2000)]

    def side(held_out):
        split, found = Split(IndexedDocuments(texts), 0.1, held_out), []
        while got := split.take(7):
            found += got
        return found

    train, held_out = side(False), side(True)
    assert sorted(train + held_out) == sorted(texts)
    assert 140 < len(held_out) < 260
