import random

import pytest
import torch

from hf_matryoshka_sae.activations import (
    ActivationStream,
    IndexedDocuments,
    PrefetchedStream,
    TokenStream,
    harvest,
    harvest_rows,
)

from . import tiny


HOOKPOINTS = ["model.layers.1", "model.layers.0:input"]


def _stream(model, num_epochs=None, count=120, batch_size=24, buffer_tokens=400, pack=True, **options):
    documents = IndexedDocuments(tiny.texts(count), shuffle=True)
    tokens = TokenStream(documents, tiny.tokenizer(), 16, 4, num_epochs=num_epochs, pack=pack)
    return ActivationStream(model, tokens, HOOKPOINTS, batch_size, buffer_tokens, **options)


def _kept_states(model, pack=True, count=120):
    """Hidden states of one epoch at the kept positions, from the full forward pass."""
    documents = IndexedDocuments(tiny.texts(count), shuffle=True)
    rows = []
    for batch in TokenStream(documents, tiny.tokenizer(), 16, 4, num_epochs=1, pack=pack):
        with torch.no_grad():
            output = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        rows.append(torch.stack([output.hidden_states[2], output.hidden_states[0]], 2)[batch.keep])
    return torch.cat(rows)  # [N, 2, D]


def _stacked(batches):
    return torch.cat([torch.stack([batch[name] for name in HOOKPOINTS], 1) for batch in batches])


def _sorted(rows):
    return rows[rows[:, 0, 0].argsort()]


@pytest.mark.parametrize("pack", [True, False])
def test_each_kept_position_is_given_once_and_aligned(pack):
    model = tiny.llama()
    stream = _stream(model, num_epochs=1, pack=pack)
    rows, expected = _stacked(stream), _kept_states(model, pack)
    assert stream.tokens_seen == len(rows) == len(expected)
    torch.testing.assert_close(_sorted(rows), _sorted(expected))


def test_rows_of_a_batch_come_from_many_sequences():
    model = tiny.llama()
    expected = _kept_states(model)
    batch = next(_stream(model))["model.layers.1"]
    places = torch.cdist(batch, expected[:, 0]).argmin(1)
    assert len((places // 15).unique()) > 10  # at most 15 rows of a window: in order, 24 rows would be of two


def test_batches_have_one_size_and_the_type_asked_for():
    stream = _stream(tiny.llama(), dtype=torch.bfloat16)
    for _ in range(20):
        batch = next(stream)
        assert {tuple(rows.shape) for rows in batch.values()} == {(24, 16)}
        assert {rows.dtype for rows in batch.values()} == {torch.bfloat16}
    assert stream.tokens_seen == 20 * 24


def test_resumed_equals_uninterrupted_bit_for_bit():
    model = tiny.llama()
    whole = _stream(model)
    expected = [next(whole) for _ in range(60)]
    for stop in [0, *random.Random(0).sample(range(50), 5)]:
        part = _stream(model)
        for _ in range(stop):
            next(part)
        resumed = _stream(model, seed=7)
        resumed.load_state_dict(part.state_dict())
        assert resumed.tokens_seen == 24 * stop
        for i in range(stop, 60):
            batch = next(resumed)
            assert all(torch.equal(batch[name], expected[i][name]) for name in HOOKPOINTS)


def test_peek_uses_nothing_up():
    model = tiny.llama()
    stream, other = _stream(model), _stream(model)
    shown = _stacked(stream.peek(100, chunk_size=30))
    assert stream.tokens_seen == 0 and len(shown) == 100
    assert torch.equal(shown[:96], _stacked([next(stream) for _ in range(4)]))
    assert torch.equal(shown[:96], _stacked([next(other) for _ in range(4)]))


class _Spiked(torch.nn.Module):
    """A layer that gives some tokens a hidden state of another kind."""

    def __init__(self, layer, value):
        super().__init__()
        self.layer, self.value, self.count = layer, value, 0

    def forward(self, *args, **kwargs):
        states = self.layer(*args, **kwargs).clone()
        states[:, 3] = self.value
        self.count += len(states)
        return states


def test_outliers_are_left_out_and_counted():
    model = tiny.llama()
    model.model.layers[1] = spiked = _Spiked(model.model.layers[1], 1e4)
    plain = _stream(model, num_epochs=1, count=60)
    assert (_stacked(plain) > 1e3).any()
    spiked.count = 0
    stream = _stream(model, num_epochs=1, count=60, max_norm_factor=50)
    rows = _stacked(stream)
    assert not (rows > 1e3).any()
    assert 0 < stream.num_outliers <= spiked.count and len(rows) + stream.num_outliers == plain.tokens_seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_at_one_hookpoint_are_left_out_of_all_and_counted(value):
    model = tiny.llama()
    model.model.layers[1] = _Spiked(model.model.layers[1], value)
    documents = TokenStream(IndexedDocuments(tiny.texts(60), shuffle=True), tiny.tokenizer(), 16, 4, num_epochs=1)
    harvested = (harvest_rows(model, batch, HOOKPOINTS) for batch in documents)
    rows = torch.cat([torch.stack(list(batch.values()), 1) for batch in harvested])
    finite = rows.isfinite().flatten(1).all(1)
    assert 0 < (~finite).sum() < len(rows) / 2
    for options in ({}, {"max_norm_factor": 50}, {"dtype": torch.bfloat16}):
        stream = _stream(model, num_epochs=1, count=60, **options)
        found = _stacked(stream)
        assert found.isfinite().all() and len(found) == finite.sum()
        assert stream.num_not_finite == (~finite).sum() and stream.num_outliers == 0
        assert _stacked(_stream(model, num_epochs=1, count=60, **options).peek(200)).isfinite().all()


def _every_fifth_token(model, value=torch.nan):
    """Makes the states at the second layer of every fifth word not finite: words, so that the same tokens are bad."""

    def spoil(module, arguments, output):
        output = output.clone()
        output[ids[0] % 5 == 0] = value
        return output

    ids = [None]
    model.model.embed_tokens.register_forward_pre_hook(lambda module, arguments: ids.__setitem__(0, arguments[0]))
    model.model.layers[1].register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("ahead", [False, True])
def test_counts_and_rows_go_on_where_a_stream_with_bad_rows_was_left(ahead):
    model = _every_fifth_token(tiny.llama())
    wrapped = PrefetchedStream if ahead else lambda stream: stream
    whole = _stream(model)
    expected, counts = [], []
    for _ in range(40):
        expected.append(next(whole))
        counts.append(whole.num_not_finite)
    assert 0 < counts[0] < counts[-1]
    for stop in (0, 7, 33):
        part = wrapped(_stream(model))
        for _ in range(stop):
            next(part)
        resumed = wrapped(_stream(model, seed=7))
        resumed.load_state_dict(part.state_dict())
        for i in range(stop, 40):
            batch = next(resumed)
            assert all(torch.equal(batch[name], expected[i][name]) for name in HOOKPOINTS)
            assert resumed.num_not_finite == counts[i]
        resumed.close()


def test_a_state_from_before_bad_rows_were_counted_is_gone_on_from():
    state = _stream(tiny.llama()).state_dict()
    del state["num_not_finite"]
    stream = _stream(tiny.llama())
    stream.load_state_dict(state)
    assert stream.num_not_finite == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_model_that_gives_no_finite_row_at_all_is_told_soon(ahead):
    model = tiny.llama()
    model.model.norm.register_forward_hook(lambda *_: pytest.fail("the forward pass goes on past the last hookpoint"))
    model.model.layers[0].register_forward_hook(lambda module, arguments, output: output * torch.nan)
    stream = PrefetchedStream(_stream(model)) if ahead else _stream(model)
    with pytest.raises(ValueError, match=r"No hidden state of 8 forward passes.*model.layers.1.*float32"):
        next(stream)
    stream.close()


def test_an_encoder_feeds_the_stream():
    model, tokenizer = tiny.bert(), tiny.tokenizer("encoder")
    tokens = TokenStream(tiny.texts(50), tokenizer, 16, 4)
    rows = next(ActivationStream(model, tokens, ["bert.encoder.layer.1"], 20, 200))
    assert rows["bert.encoder.layer.1"].shape == (20, 16)


def test_the_model_is_put_in_eval_mode():
    model = tiny.gpt2().train()
    tokens = TokenStream(tiny.texts(50), tiny.tokenizer(), 16, 4)
    ActivationStream(model, tokens, ["transformer.h.0"], 20, 200)
    ids = torch.arange(10, 20)[None]
    first, second = (harvest(model, ids, None, ["transformer.h.0"])["transformer.h.0"] for _ in range(2))
    assert torch.equal(first, second)


def test_errors():
    with pytest.raises(ValueError, match="at least batch_size .* = 24 . 64, got 80"):
        _stream(tiny.llama(), buffer_tokens=80)
    tokens = TokenStream(tiny.texts(50), tiny.tokenizer(), 65, 4)
    with pytest.raises(ValueError, match="`context_length` is 65, but the model reads at most 64"):
        ActivationStream(tiny.llama(), tokens, HOOKPOINTS, 24, 1000)
