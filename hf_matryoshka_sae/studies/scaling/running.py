"""Train runs one after the other, or several at a time, each in a process and on a device of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ...activations import has_cache
from ...common.command import Interrupted
from ...training import RunConfig, train
from ...training.data.placement import Processes
from ...training.data.text import TextSource
from ...training.run.trainer import make_accelerator
from .plan import cost


_POLL_SECONDS = 0.2
_LAST_LINES = 8
_LOG = "log.txt"


def default_processes() -> int:
    """Return the number of CUDA devices, or one."""
    return max(1, torch.cuda.device_count())


def train_runs(runs: Sequence[RunConfig], processes: int = 1) -> None:
    """Train planned runs to their ends, each from its newest checkpoint.

    With one process they are trained in this one. Several processes are spread evenly over the CUDA devices, or share
    the cores; a run's output is in its folder, in `log.txt`.

    Args:
        runs (`list[RunConfig]`): Runs of [`plan_runs`].
        processes (`int`, *optional*, defaults to 1): Number of runs at a time.

    Raises:
        [`Interrupted`]: after Ctrl-C or a termination request, when every run has saved a checkpoint.
        `ValueError`: if a run cannot be trained. Runs beside it are stopped and keep their checkpoints.
    """
    if not runs:
        return
    _build_cache(runs)
    if processes == 1:
        for i, run in enumerate(runs):
            sys.stdout.write(f"Run {i + 1} of {len(runs)}: {len(run.saes)} SAEs, {run.tokens} tokens each.\n")
            train(run)
        return
    waiting = sorted(runs, key=cost)  # `pop` takes the longest first, so that no long run is left for the end
    running: dict[int, tuple[RunConfig, subprocess.Popen]] = {}
    with _termination_is_ctrl_c(), tqdm(total=sum(map(cost, runs)), unit="latent-tok", unit_scale=True) as bar:
        try:
            while waiting or running:
                for slot in range(processes):
                    if waiting and slot not in running:
                        run = waiting.pop()
                        running[slot] = run, _start(run, slot, processes)
                time.sleep(_POLL_SECONDS)
                for slot, (run, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        _check(run, process.returncode)
                bar.n = sum(_done(run) for run in runs)
                bar.refresh()
        except KeyboardInterrupt:
            raise Interrupted("Stopped; what was trained is saved. Run the same command again to go on.") from None
        finally:
            _stop([process for _, process in running.values()])


def _build_cache(runs: Sequence[RunConfig]) -> None:
    """Build shared caches with their largest run: runs must not build one at once, nor one that is too small."""
    largest = {run.activation_cache: run for run in sorted(runs, key=lambda run: run.tokens)}
    for folder, run in largest.items():
        if folder is not None and not has_cache(folder):
            accelerator = make_accelerator(run)
            for stream in TextSource(run, accelerator, Processes.of(run)).streams().values():
                stream.close()


def _start(run: RunConfig, slot: int, processes: int) -> subprocess.Popen:
    environment = dict(os.environ)
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    folder = Path(run.output_dir)
    with open(folder / _LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hf_matryoshka_sae.studies.scaling.worker", str(folder / "run.yaml"), str(folder)],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is passed on once, by this process
        )


def _check(run: RunConfig, status: int) -> None:
    if status:
        path = Path(run.output_dir) / _LOG
        text = path.read_text(errors="replace").replace("\r", "\n")
        last = "\n".join([line for line in text.splitlines() if line.strip()][-_LAST_LINES:])
        raise ValueError(f"The run in {run.output_dir} ended with status {status}; {path} ends with\n{last}")


def _done(run: RunConfig) -> float:
    """Return the part of a run's cost that is done, from the last line it logged."""
    try:
        last = (Path(run.output_dir) / "metrics.jsonl").read_bytes().splitlines()[-1]
        return cost(run) * json.loads(last)["step"] / run.steps
    except (OSError, IndexError, ValueError, KeyError):
        return 0.0


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Terminate the processes and wait until they have saved a checkpoint."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


@contextmanager
def _termination_is_ctrl_c() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
