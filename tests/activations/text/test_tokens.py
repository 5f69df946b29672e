import json
import random

import pytest
import torch

from hf_matryoshka_sae.activations import IndexedDocuments, TokenStream, heldout_batches

from .. import tiny


def _reference_windows(texts, tokenizer, context_length):
    """Packing, one token at a time."""
    line = []
    for text in texts:
        line += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    body = context_length - 1
    return [[tokenizer.bos_token_id, *line[i : i + body]] for i in range(0, len(line) - body + 1, body)]


def test_packed_windows_equal_the_reference():
    tokenizer, texts = tiny.tokenizer(), tiny.texts(200)
    batches = list(TokenStream(texts, tokenizer, 16, 5, num_epochs=1))
    windows = torch.cat([batch.input_ids for batch in batches]).tolist()
    assert windows == _reference_windows(texts, tokenizer, 16)
    assert all(batch.attention_mask.all() and not batch.padded for batch in batches)
    assert all(len(batch.input_ids) == 5 for batch in batches[:-1])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bos", [["<s>", "<s>", "w1", "w2"], ["<s>", "w3", "<s>", "w4"], ["<s>", "w5", "<s>", "w6"]]),
        ("eos", [["w1", "w2", "w3", "</s>"], ["w4", "w5", "</s>", "w6"]]),
        ("bare", [["w1", "w2", "w3", "w4"], ["w5", "w6", "w7", "w8"]]),
        (
            "encoder",
            [
                ["[CLS]", "w1", "w2", "[SEP]"],
                ["[CLS]", "w3", "[SEP]", "[SEP]"],
                ["[CLS]", "w4", "w5", "[SEP]"],
                ["[CLS]", "[SEP]", "w6", "[SEP]"],
                ["[CLS]", "w7", "w8", "[SEP]"],
            ],
        ),
    ],
)
def test_packing_follows_the_tokenizer(kind, expected):
    tokenizer = tiny.tokenizer(kind)
    stream = TokenStream(["w1 w2 w3", "w4 w5", "w6 w7 w8"], tokenizer, 4, 10, num_epochs=1)
    rows = [tokenizer.convert_ids_to_tokens(row) for batch in stream for row in batch.input_ids.tolist()]
    assert rows[: len(expected)] == expected


def test_unpacked_rows_are_truncated_and_padded():
    tokenizer = tiny.tokenizer("encoder")
    batch = next(TokenStream(["w1 w2 w3 w4", "w5"], tokenizer, 5, 2, pack=False))
    rows = [tokenizer.convert_ids_to_tokens(row) for row in batch.input_ids.tolist()]
    assert rows == [["[CLS]", "w1", "w2", "w3", "[SEP]"], ["[CLS]", "w5", "[SEP]", "<pad>", "<pad>"]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.keep.tolist() == [[False, True, True, True, False], [False, True, False, False, False]]


def test_a_tokenizer_without_padding_token_still_pads():
    batch = next(TokenStream(["w1 w2 w3", "w4"], tiny.tokenizer("bare"), 8, 2, pack=False, exclude="none"))
    assert batch.keep.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("special", [[0, 0, 1, 1], [0, 1, 0, 1]]),
        ("first", [[0, 1, 1, 1], [0, 1, 1, 1]]),
        ("none", [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_exclusions(exclude, expected):
    batch = next(TokenStream(["w1 w2 oops", "w4 w5"], tiny.tokenizer(), 4, 2, exclude=exclude))
    assert batch.keep.int().tolist() == expected  # "oops" is unknown, but text


def test_position_zero_is_left_out_where_there_is_no_special_token():
    batch = next(TokenStream(["w1 w2 w3 w4"], tiny.tokenizer("bare"), 4, 1))
    assert batch.keep.tolist() == [[False, True, True, True]]


def test_a_bos_written_by_a_chat_template_is_not_doubled():
    batch = next(TokenStream(["<s> w1 w2"], tiny.tokenizer(), 5, 1, pack=False))
    assert batch.input_ids.tolist() == [[0, 7 + 1, 7 + 2]]


def test_endless_streams_read_on_without_losing_tokens(caplog):
    texts = tiny.texts(10)
    tokenizer = tiny.tokenizer()
    stream = TokenStream(IndexedDocuments(texts, shuffle=True), tokenizer, 16, 2)
    words = [len(text.split()) + 1 for text in texts]
    taken = []
    while len(taken) < 3 * sum(words):
        taken += next(stream).input_ids[:, 1:].flatten().tolist()
    first = sum(words)
    assert sorted(taken[:first]) == sorted(taken[first : 2 * first]) and taken[:first] != taken[first : 2 * first]
    assert sum("read once" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("pack", [True, False])
def test_resumed_equals_uninterrupted(pack):
    tokenizer = tiny.tokenizer()

    def stream():
        return TokenStream(IndexedDocuments(tiny.texts(90), shuffle=True), tokenizer, 16, 3, pack=pack)

    whole = stream()
    expected = [next(whole).input_ids for _ in range(120)]
    for stop in random.Random(0).sample(range(100), 6):
        part = stream()
        for _ in range(stop):
            next(part)
        state = part.state_dict()
        json.dumps({key: value for key, value in state.items() if not isinstance(value, torch.Tensor)})
        resumed = stream()
        resumed.load_state_dict(state)
        assert all(torch.equal(next(resumed).input_ids, expected[i]) for i in range(stop, 120))


def test_two_processes_read_what_one_reads():
    texts, tokenizer = tiny.texts(41), tiny.tokenizer()

    def words(rank, world_size):
        documents = IndexedDocuments(texts, shuffle=True, rank=rank, world_size=world_size)
        batches = TokenStream(documents, tokenizer, 32, 4, pack=False, num_epochs=1)
        return sum((batch.input_ids[batch.keep].tolist() for batch in batches), [])

    assert sorted(words(0, 2) + words(1, 2)) == sorted(words(0, 1))


def test_heldout_batches_keep_exactly_the_tokens_asked_for():
    texts, tokenizer = tiny.texts(200), tiny.tokenizer()
    batches = heldout_batches(texts, tokenizer, 16, 100, 3)
    full = torch.cat([batch.input_ids for batch in TokenStream(texts, tokenizer, 16, 3, num_epochs=1)])
    keep = torch.cat([batch.keep for batch in batches])
    assert keep.sum() == 100 and keep[-1].any()
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), full[: len(keep)])


def test_heldout_batches_of_a_small_data_set(caplog):
    batches = heldout_batches(["w1 w2 w3"], tiny.tokenizer(), 16, 100, pack=False)
    assert sum(int(batch.keep.sum()) for batch in batches) == 3 and "fewer than the 100" in caplog.text
    with pytest.raises(ValueError, match="does not fill one window of 16"):
        heldout_batches(["w1 w2 w3"], tiny.tokenizer(), 16, 100)


@pytest.mark.parametrize("num_epochs", [None, 1])
def test_empty_documents_are_an_error_rather_than_an_endless_search(num_epochs):
    with pytest.raises(ValueError, match="all of its documents are empty"):
        next(TokenStream(["", "  "], tiny.tokenizer(), 16, 2, num_epochs=num_epochs))


def test_options_are_checked():
    with pytest.raises(ValueError, match="special, first, none"):
        TokenStream(["w1"], tiny.tokenizer(), 16, 2, exclude="bos")
    with pytest.raises(ValueError, match="room for text"):
        TokenStream(["w1"], tiny.tokenizer("encoder"), 2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        TokenStream(["w1"], tiny.tokenizer(), 16, 0)


def test_the_tokenizer_may_be_used_and_configured_meanwhile():
    tokenizer = tiny.tokenizer()
    stream = TokenStream(tiny.texts(500), tokenizer, 16, 4)
    expected = next(TokenStream(tiny.texts(500), tiny.tokenizer(), 16, 4)).input_ids
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert torch.equal(next(stream).input_ids, expected)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
    for _ in range(200):
        next(stream)
        tokenizer("w1 w2", truncation=True, max_length=2)
