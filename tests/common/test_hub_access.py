"""Without a network a repository that is not at hand is told at once; all else is left to the loaders."""

import errno
import socket
import time

import pytest
from huggingface_hub import constants

from hf_matryoshka_sae.activations import DatasetConfig, load_documents, load_language_model
from hf_matryoshka_sae.common import hub_access
from hf_matryoshka_sae.common.hub_access import check_reachable


@pytest.fixture
def network(monkeypatch):
    """What trying to connect does, and how often it was tried."""
    outcomes, tries = [], []

    def connect(address, timeout):
        tries.append(address)
        if outcomes:
            raise outcomes[0] if len(outcomes) == 1 else outcomes.pop(0)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(hub_access.urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return outcomes, tries


def test_no_network_is_told_within_two_seconds(network, monkeypatch):
    network[0].append(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(ValueError, match="no/such.*not on this machine.*hub.example cannot be reached.*`embedded`"):
        load_language_model("no/such")
    with pytest.raises(ValueError, match="no/data.*not on this machine.*hub.example cannot be reached"):
        load_documents(DatasetConfig("no/data"))
    assert 0 < sum(pauses) < 2  # in both; a machine that has no network fails to connect at once
    assert network[1] == [("hub.example", 443)] * 6


def test_a_network_that_comes_back_or_is_slow_or_behind_a_proxy_is_left_to_the_loaders(network, monkeypatch):
    outcomes, tries = network
    outcomes += [OSError(errno.ENETUNREACH, "Network is unreachable"), TimeoutError("timed out")]
    check_reachable("no/such", "config.json")
    assert len(tries) == 2
    outcomes[:] = [socket.gaierror(socket.EAI_NONAME, "Name or service not known")]
    monkeypatch.setattr(hub_access.urllib.request, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    check_reachable("no/such", "config.json")
    assert len(tries) == 2


def test_what_is_at_hand_needs_no_network(network, tmp_path, monkeypatch):
    outcomes, tries = network
    outcomes.append(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    check_reachable(str(tmp_path), "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *arguments, **options: "/cache/config.json")
    check_reachable("some/model", "config.json")
    assert tries == []
