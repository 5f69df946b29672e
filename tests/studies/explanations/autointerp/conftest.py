"""A judge on the loopback interface, and text to explain latents from."""

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from hf_matryoshka_sae.evaluation import HeldOut, open_heldout

from ....evaluation.planted import EMBEDDING
from .chat_server import ChatServer


@pytest.fixture
def chat(monkeypatch) -> Iterator[ChatServer]:
    """A chat server that this process may talk to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def text() -> tuple[HeldOut, HeldOut]:
    """Examples and test text at the embedding layer of the embedded model."""
    options = {"hookpoint": EMBEDDING, "lm_batch_size": 8}
    return (
        open_heldout("embedded", dataset={"path": "embedded", "split": "train"}, tokens=8_000, **options),
        open_heldout("embedded", dataset={"path": "embedded", "split": "heldout"}, tokens=8_000, **options),
    )
