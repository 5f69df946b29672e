"""A GPU that is lent by the call, with a stand-in for the Hub's helper."""

import sys
from types import SimpleNamespace

import pytest

from hf_matryoshka_sae.space.limits import on_gpu, wanted


class Asked:
    """Something with a library that notes what is done to it."""

    def __init__(self):
        self.done = []
        self.library = SimpleNamespace(
            to=lambda device: self.done.append(device), renew_locks=lambda: self.done.append("locks")
        )


def test_without_one_a_method_stays_as_it_is(monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)

    def method(self):
        return 3

    assert on_gpu(method) is method and on_gpu(seconds=300)(method) is method


@pytest.mark.parametrize("seconds", [None, 300])
def test_where_one_is_lent_models_go_there_first(monkeypatch, seconds):
    lent = []

    def gpu(duration):
        lent.append(duration)
        return lambda method: method

    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=gpu))

    def method(self, one, two=2):
        self.done.append("ran")
        return one + two

    moved = on_gpu(method) if seconds is None else on_gpu(seconds=seconds)(method)
    asked = Asked()
    assert moved(asked, 1, two=5) == 6 and asked.done == ["locks", "cuda", "ran"] and lent == [seconds or 60]
    assert moved.__name__ == "method"


def test_what_no_visitor_asked_for_is_wanted():
    assert wanted()
