"""The embedded language model: small enough to ship, good enough to stand for a real one."""

import json
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_matryoshka_sae.assets import embedded_lm_path, embedded_text, language_model, load_embedded_lm


CONTEXT = 256


@pytest.fixture(scope="module")
def lm():
    return load_embedded_lm()


@pytest.fixture(scope="module")
def windows(lm) -> torch.Tensor:
    """32 held-out windows, cut as in training: `bos_token` first, and before each document."""
    _, tokenizer = lm
    rows = tokenizer(embedded_text("heldout"), verbose=False)["input_ids"]
    stream = torch.tensor([token for row in rows for token in (tokenizer.bos_token_id, *row)])
    body = stream[: 32 * (CONTEXT - 1)].view(32, CONTEXT - 1)
    return torch.nn.functional.pad(body, (1, 0), value=tokenizer.bos_token_id)


def test_auto_classes_load_it_in_float32_with_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the embedded model must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, info = AutoModelForCausalLM.from_pretrained(embedded_lm_path(), output_loading_info=True)
    assert not any(info.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(embedded_lm_path()).bos_token_id == 0


def test_the_folder_is_at_most_four_megabytes_and_complete():
    sizes = {path.name: path.stat().st_size for path in embedded_lm_path().iterdir()}
    assert sum(sizes.values()) <= 4_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= set(sizes)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(sizes)


def test_tokenizer_gives_any_text_back(lm):
    _, tokenizer = lm
    text = "def f(x):\n    return x ** 2  # naïve — 日本語 \U0001f40d\n\n\n\tdone"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(tokenizer.bos_token)["input_ids"] == [0]


def test_hidden_states_are_finite_float32_and_differ_between_layers(lm):
    model, tokenizer = lm
    inputs = tokenizer([tokenizer.bos_token + "Return a new list of the items in x."], return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert all(state.dtype == torch.float32 and state.isfinite().all() for state in states)
    assert all(not torch.allclose(a, b) for a, b in zip(states, states[1:], strict=False))
    assert not model.training


def test_heldout_loss_is_far_below_counting_words(lm, windows):
    """The bound is the unigram entropy of the very tokens that are scored: no model without context does better."""
    model, _ = lm
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    counts = torch.bincount(windows[:, 1:].flatten()).double()
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum().item()
    assert loss < entropy - 1.5
    assert loss < 3.7


def test_it_uses_context_beyond_the_previous_tokens(lm, windows):
    model, _ = lm
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(0)
    assert losses[128:].mean() < losses[:8].mean() - 0.3


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(language_model, "__file__", str(tmp_path / "language_model.py"))
    with pytest.raises(FileNotFoundError, match="train_embedded_lm.py"):
        embedded_lm_path()


def test_the_card_states_the_size_and_the_losses():
    config = json.loads((Path(embedded_lm_path()) / "config.json").read_text())
    card = (Path(embedded_lm_path()) / "README.md").read_text()
    assert f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}" in card
    assert "unigram" in card and "bigram" in card
