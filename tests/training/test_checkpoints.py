"""Checkpoints are whole or absent."""

import errno

import pytest
import torch

from hf_matryoshka_sae.training import checkpoints as module
from hf_matryoshka_sae.training.checkpoints import Checkpoints, load_tree, save_tree


TREE = {"weights": {"W": torch.randn(3, 2), "steps": torch.tensor(7)}, "list": [1, 2.5, None, "x", True], "empty": {}}


def store(folder, keep=2):
    return Checkpoints(folder, keep, 0, lambda: None)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and type(a) is type(b)


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    save_tree(tmp_path / "state", TREE)
    assert equal(load_tree(tmp_path / "state"), TREE)


def test_something_that_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match="/f"):
        save_tree(tmp_path / "state", {"f": object()})


def test_the_newest_checkpoint_is_loaded_and_old_ones_go(tmp_path):
    for step in (1, 2, 3):
        store(tmp_path).save(step, {"step": step}, {"own": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000003"]
    assert store(tmp_path).load() == (3, {"step": 3}, {"own": 3})


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_broken_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    for step in (1, 2):
        store(tmp_path).save(step, TREE, {"own": step})
    file = tmp_path / "checkpoint-00000002" / ("manifest.json" if damage == "manifest" else "shared.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    step, shared, own = store(tmp_path).load()
    assert (step, own) == (1, {"own": 1})
    assert equal(shared, TREE)


def test_no_checkpoint_is_none(tmp_path):
    assert store(tmp_path).load() is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    store(tmp_path).save(1, TREE, {"own": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path).save(2, TREE, {"own": 2})
    monkeypatch.undo()
    assert store(tmp_path).load()[0] == 1
    store(tmp_path).save(3, TREE, {"own": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001", "checkpoint-00000003"]
