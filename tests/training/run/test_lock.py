"""A run's folder is held by one run at a time, which the others are told."""

import errno
import json
import os
import subprocess
import sys
import types

import filelock
import pytest

from hf_matryoshka_sae import train as command
from hf_matryoshka_sae.training import train
from hf_matryoshka_sae.training.run import trainer as trainer_module
from hf_matryoshka_sae.training.run.folder import RunFolder
from hf_matryoshka_sae.training.run.lock import RunLock

from ...processes import Launch
from .test_trainer import RUN, config


ONE = types.SimpleNamespace(is_main_process=True, num_processes=1)


def test_a_second_run_is_told_who_holds_the_folder_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "open_harvest", lambda *_: pytest.fail("loaded the language model"))
    holder = RunLock(tmp_path)
    holder.acquire()
    with pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on .*, since 20"):
        train(config(tmp_path))
    assert not (tmp_path / "run.yaml").exists()
    holder.release()
    RunLock(tmp_path).acquire()


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="the holder locks as Unix does")
def test_a_killed_holder_keeps_nobody_out(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another run .a process that has not said which"):
            RunLock(tmp_path).acquire()
        holder.kill()
    RunLock(tmp_path).acquire()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_said_and_nothing_is_cleaned_there(tmp_path, monkeypatch, caplog, error):
    def without(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", without)
    staging = tmp_path / ".checkpoint-00000005-abc.tmp"  # of a run that may be alive
    staging.mkdir()
    with RunFolder(config(tmp_path), ONE):
        assert "has no locks" in caplog.text and staging.is_dir()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_used_is_one_line_and_a_status(tmp_path, capsys, place):
    (tmp_path / "file").touch()
    fields = {**RUN, "output_dir": str(tmp_path / place)}
    assert command.main([f"--{name}={json.dumps(value)}" for name, value in fields.items()]) == 2
    said = capsys.readouterr().err
    assert f"error: `output_dir` {tmp_path / place} cannot be written to" in said and "Traceback" not in said


@pytest.mark.release
def test_every_process_of_a_launch_is_refused(tmp_path):
    holder = RunLock(tmp_path / "run")
    holder.acquire()
    refused = Launch(tmp_path, 2, **RUN)
    assert refused.statuses() == [2, 2]
    for log in refused.logs:
        assert f"in use by another run (process {os.getpid()} on" in log.read_text()
        assert "Process 0 of 2 failed" not in log.read_text()
