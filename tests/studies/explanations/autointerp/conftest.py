"""A judge on the loopback interface."""

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from .chat_server import ChatServer


@pytest.fixture
def chat(monkeypatch) -> Iterator[ChatServer]:
    """A chat server that this process may talk to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ChatServer()
    yield server
    server.close()
