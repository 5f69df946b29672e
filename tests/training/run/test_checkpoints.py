"""Checkpoints are whole or absent."""

import errno
import hashlib
import json
import os

import pytest
import torch

from hf_matryoshka_sae.training.run import checkpoints as module
from hf_matryoshka_sae.training.run.checkpoints import Checkpoints, load_tree, save_tree


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


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    store(tmp_path).save(1, {"shared": TREE})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path).save(2, {"shared": TREE})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]  # nothing half-written
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


def test_what_was_just_saved_is_never_removed(tmp_path):
    """The newest is corrupt, so that the run goes on from the one before and saves a step between the two."""
    for step in (90, 97):
        store(tmp_path).save(step, {"run": {"step": step}})
    (tmp_path / "checkpoint-00000097" / "run.safetensors").write_bytes(b"broken")
    run = store(tmp_path, keep=1)
    assert run.load()[0] == 90
    run.save(93, {"run": {"step": 93}})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000093"]
    assert store(tmp_path).load()[0] == 93


def test_checkpoints_of_another_run_and_of_another_library_stay(tmp_path):
    for run_id in "ab":
        for step in (10, 20, 30):
            Checkpoints(tmp_path / run_id, 1, {"run_id": run_id}).save(step, {"run": {"of": run_id}})
    (tmp_path / "a/checkpoint-00000030").rename(tmp_path / "b/checkpoint-00000040")
    (tmp_path / "b/checkpoint-5").mkdir()  # as transformers' Trainer names them
    run = Checkpoints(tmp_path / "b", 1, {"run_id": "b"})
    run.save(50, {"run": {"of": "b"}})
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "checkpoint-00000040",
        "checkpoint-00000050",
        "checkpoint-5",
    ]
    with pytest.raises(OSError, match="of another run"):
        run.save(40, {"run": {}})
    assert Checkpoints(tmp_path / "b", 1).load()[0] == 50


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_while_a_step_is_saved_again_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    store(tmp_path, keep=1).save(7, {"run": {"try": 1}})
    calls = []

    def killed(name, before):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) > moment:  # nothing happens after a kill, no cleaning either
                raise Killed
            return before(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed("replace", os.replace))
        patch.setattr(module.shutil, "rmtree", killed("rmtree", module.shutil.rmtree))
        try:
            store(tmp_path, keep=1).save(7, {"run": {"try": 2}})
        except Killed:
            pass
    step, checkpoint = store(tmp_path, keep=1).load()
    assert (step, checkpoint.tree("run")["try"]) in ((7, 1), (7, 2))
    assert checkpoint.tree("run")["try"] == 2 or moment < 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000007"]
    store(tmp_path, keep=1).save(8, {"run": {"try": 3}})
    assert store(tmp_path).load()[0] == 8


@pytest.mark.parametrize(
    "manifest",
    ["[]", "null", '{"files": {}}', '{"files": []}', "{}", '{"step": 9, "files": {"run.json": "x"}}', "\x00"],
)
def test_a_manifest_that_is_none_is_passed_over(tmp_path, manifest, caplog):
    for step in (1, 2):
        store(tmp_path).save(step, {"run": {"step": step}})
    (tmp_path / "checkpoint-00000002" / "manifest.json").write_text(manifest)
    run = store(tmp_path)
    assert run.load()[0] == 1 and "is broken" in caplog.text
    run.save(2, {"run": {"step": 2}})
    assert store(tmp_path).load()[1].tree("run") == {"step": 2}


def test_files_outside_a_checkpoint_are_not_read(tmp_path):
    path = store(tmp_path).save(1, {"run": {}}) / "manifest.json"
    manifest = json.loads(path.read_text())
    (tmp_path / "outside").write_bytes(b"")
    digest = hashlib.sha256(b"").hexdigest()
    path.write_text(json.dumps(manifest | {"files": {"../outside": digest, **manifest["files"]}}))
    assert store(tmp_path).load() is None


def test_files_named_as_folders_of_checkpoints_are_in_nobodys_way(tmp_path):
    for name in (".checkpoint-00000001.tmp", ".checkpoint-00000001.old", "checkpoint-00000001", "checkpoint-00000009"):
        (tmp_path / name).write_text("a file")
    run = store(tmp_path)
    assert run.load() is None
    run.save(1, {"run": {"step": 1}})
    run.save(9, {"run": {"step": 9}})
    assert store(tmp_path).load()[0] == 9
