"""The benchmark of broken checkpoints: what it reports, and that all it breaks is survived."""

import random

import pytest

from benchmarks.fault_kinds import checkpoints
from benchmarks.fault_kinds.checkpoint_mutations import Fault
from benchmarks.fault_kinds.outcome import Outcome


@pytest.mark.release
def test_broken_checkpoints_are_survived():
    outcome = checkpoints.run(seed=7, count=80, workers=1)
    assert outcome == Outcome("mutated checkpoints", 80, 80, [])


def test_what_is_not_survived_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "case" / "topk"
    folder.mkdir(parents=True)
    rng, marker = random.Random(0), tmp_path / "marker"

    def wrong(answer, fault=None):
        monkeypatch.setattr(checkpoints, "_loaded", lambda *_: answer)
        return checkpoints._wrong("topk", folder, marker, fault or Fault("broken"), rng)

    assert wrong(None) is None and wrong(ValueError("topk is damaged")) is None
    assert wrong(None, Fault("code", refused=True)) == "loaded, and must be refused"
    assert "raised KeyError" in wrong(KeyError("topk"))
    assert "names no file" in wrong(ValueError("damaged"))
    assert "torch's advice" in wrong(ValueError("topk: weights_only"))
    monkeypatch.setattr(checkpoints, "_loaded", lambda *_: folder.joinpath("new").touch())
    assert "wrote or took away" in checkpoints._wrong("topk", folder, marker, Fault("x"), rng)
    marker.touch()
    assert wrong(None) == "code of the file ran"
