"""A process that ends takes the others with it, and they say why."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator

from hf_matryoshka_sae.training.watchdog import Watchdog, is_running


# Process 1 ends as the argument says while process 0 is busy with something that never ends.
CODE = """
import os, sys, time
from pathlib import Path
from accelerate import Accelerator
from hf_matryoshka_sae.training.watchdog import Watchdog
accelerator = Accelerator(cpu=True)
with Watchdog(accelerator, Path(sys.argv[2])):
    if accelerator.process_index == 1:
        time.sleep(1)
        if sys.argv[1] == "silently":
            os._exit(9)
        if sys.argv[1] == "with an error":
            raise ValueError("out of luck")
    elif sys.argv[1] != "well":
        time.sleep(1000)
sys.exit(0)
"""


def run(how: str, folder: Path) -> tuple[list[int], str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, how, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    processes[1].wait(120)
    began = time.monotonic()
    said = processes[0].communicate(timeout=60)[1]
    return [process.returncode for process in processes], said, time.monotonic() - began


def test_a_process_that_is_gone_ends_the_other(tmp_path):
    (tmp_path / "checkpoint-00000004").mkdir()
    statuses, said, seconds = run("silently", tmp_path)
    assert statuses == [1, 9] and seconds < 60
    assert "Process 1 of 2" in said and "was killed, or its machine is gone" in said
    assert f"The last checkpoint is {tmp_path / 'checkpoint-00000004'}: run the same command again" in said


@pytest.mark.slow
def test_an_error_is_told_to_all(tmp_path):
    statuses, said, _ = run("with an error", tmp_path)
    assert statuses == [1, 1]
    assert "Process 1 of 2 failed: out of luck" in said and "No checkpoint was saved yet" in said


@pytest.mark.slow
def test_who_ends_well_first_is_not_missed(tmp_path):
    statuses, said, _ = run("well", tmp_path)
    assert statuses == [0, 0] and "error" not in said


def test_one_process_watches_nobody(tmp_path):
    with Watchdog(Accelerator(cpu=True), tmp_path) as watchdog:
        assert watchdog._thread is None


def test_a_process_that_waits_for_its_parent_does_not_run():
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert is_running(os.getpid())
    time.sleep(3)  # it has ended, but nobody has asked
    assert not is_running(child.pid)
    child.wait()
    assert not is_running(child.pid)
