"""Checkpoints are whole or absent."""

import errno

import pytest
import torch

from hf_matryoshka_sae.training import checkpoints as module
from hf_matryoshka_sae.training.checkpoints import Checkpoints, load_tree, save_tree


TREE = {"weights": {"W": torch.randn(3, 2), "steps": torch.tensor(7)}, "list": [1, 2.5, None, "x", True], "empty": {}}


def store(folder, keep=2):
    return Checkpoints(folder, keep)


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
        store(tmp_path).save(step, {"shared": {"step": step}, "own": {"own": step}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000003"]
    step, found = store(tmp_path).load()
    assert (step, found.tree("shared"), found.tree("own")) == (3, {"step": 3}, {"own": 3})


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_broken_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    for step in (1, 2):
        store(tmp_path).save(step, {"shared": TREE, "own": {"own": step}})
    file = tmp_path / "checkpoint-00000002" / ("manifest.json" if damage == "manifest" else "shared.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    step, found = store(tmp_path).load()
    assert (step, found.tree("own")) == (1, {"own": 1})
    assert equal(found.tree("shared"), TREE)


def test_no_checkpoint_is_none(tmp_path):
    assert store(tmp_path).load() is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    store(tmp_path).save(1, {"shared": TREE})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path).save(2, {"shared": TREE})
    monkeypatch.undo()
    assert store(tmp_path).load()[0] == 1
    store(tmp_path).save(3, {"shared": TREE})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001", "checkpoint-00000003"]


def test_rows_are_read_by_ranges_whoever_wrote_them(tmp_path):
    rows = {
        "weights/W": torch.randn(10, 3),
        "counts": torch.arange(10),
        "moment": torch.randint(-9, 9, (10, 3)).to(torch.int8),
    }
    folder = tmp_path / "checkpoint-00000001"
    store(tmp_path).save(1, {"one": {}}, {"a": (0, {key: value[:4] for key, value in rows.items()})})
    other = tmp_path / "other"
    store(other).save(
        1, {}, {"a": (4, {key: value[4:] for key, value in rows.items()}), "ab": (0, {"x": torch.ones(3)})}
    )
    for file in (other / folder.name).glob("a-rows-*"):
        file.rename(folder / file.name)  # as a second process would have written it
    found = module.Checkpoint(folder)
    for start, stop in ((0, 10), (0, 4), (2, 7), (4, 10), (9, 10)):
        assert equal(found.rows("a", start, stop), {key: value[start:stop] for key, value in rows.items()})
    with pytest.raises(ValueError, match="lacks rows"):
        found.rows("a", 5, 11)
