"""Kill -9 a training run at random moments, its closing included; resumed, it must give the same bits of weights."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import equal
from tqdm.auto import tqdm

from .outcome import Outcome


RUN = {
    "model": "embedded",
    "dataset": "embedded",
    "hookpoints": ["model.layers.0"],
    "context_length": 32,
    "tokens": 40 * 128,
    "batch_size": 128,
    "lm_batch_size": 8,
    "shuffle_tokens": 1024,
    "window_pool_tokens": 20_000,
    "normalization_tokens": 1024,
    "eval_tokens": 1000,
    "calibration_tokens": 1024,
    "checkpoint_every": 4,
    "log_every": 1,
    "overlap": False,
    "saes": [
        {"type": "matryoshka", "name": "nested", "num_latents": 128, "k": 8},
        {"type": "topk", "name": "plain", "num_latents": 64, "k": 4},
    ],
}
_TRIES = 10  # where a run has ended before it could be killed
_LIMIT = 600  # seconds after which a run counts as hung


def run(seed: int, count: int = 10) -> Outcome:
    """Kill a run `count` times, each time another one, and resume it.

    Args:
        seed (`int`): Of the moments: one in each of `count` equal parts of the time from the first step to the end.
        count (`int`, *optional*, defaults to 10): Kills.

    Raises:
        `RuntimeError`: if the run does not even end by itself, or always does before it is killed.
    """
    folder = Path(tempfile.mkdtemp(prefix="fault-runs-"))
    moments = random.Random(seed)
    shares = [(i + moments.random()) / count for i in range(count)]
    with tqdm(total=count + 1, desc="killed runs", unit="run") as bar, ThreadPoolExecutor(2) as pool:
        seconds = _finish(folder / "whole")
        bar.update()
        killed = partial(_kill_and_resume, folder, seconds)
        failures = []
        for i, failure in enumerate(pool.map(killed, range(count), shares)):
            bar.update()
            if failure is not None:
                failures.append(f"run(seed={seed}, count={count}), kill {i}: {failure} Left in {folder / str(i)}.")
    if not failures:
        shutil.rmtree(folder)
    return Outcome("kill -9 of a training run, resumed", count, count - len(failures), failures)


def _kill_and_resume(folder: Path, seconds: float, number: int, share: float) -> str | None:
    """What went wrong with one killed run, or None."""
    place = folder / str(number)
    for _ in range(_TRIES):
        shutil.rmtree(place, ignore_errors=True)
        process = _start(place)
        _wait_for_first_step(process, place)
        began = time.monotonic()
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL
            if process.wait() == -signal.SIGKILL:
                break
        seconds, share = time.monotonic() - began, 0.95 * share  # it was faster than the run before
    else:
        raise RuntimeError(f"The run always ended before it could be killed; left in {place}.")
    at = f"killed {share * seconds:.2f} s after its first step ({_progress(place)}),"
    try:
        _finish(place)
    except RuntimeError as error:
        return f"{at} it did not resume: {error}"
    lost = [name for name in ("nested", "plain") if not _same(place, folder / "whole", name)]
    if lost:
        return f"{at} it ended with other weights of {', '.join(lost)}."
    litter = [path.name for path in place.rglob(".*") if path.name.startswith((".checkpoint-", ".saving-"))]
    return f"{at} it left {', '.join(litter)}." if litter else None


def _start(place: Path) -> subprocess.Popen:
    flags = [f"--{name}={json.dumps(value)}" for name, value in (RUN | {"output_dir": str(place / "run")}).items()]
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hf_matryoshka_sae.train", *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )


def _wait_for_first_step(process: subprocess.Popen, place: Path) -> None:
    metrics = place / "run" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.01)


def _finish(place: Path) -> float:
    """Let a run end; seconds from its first step on. Raises `RuntimeError` where it does not."""
    process = _start(place)
    try:
        _wait_for_first_step(process, place)
        began = time.monotonic()
        status = process.wait(_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        status = "none, it hung"
    if status:
        lines = (place / "log.txt").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"status {status}; {lines[-1] if lines else 'nothing was said'}")
    return time.monotonic() - began


def _progress(place: Path) -> str:
    """How far a killed run had come."""
    folder = place / "run"
    steps = sum(1 for _ in open(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").exists() else 0
    saved = [path.name for path in sorted(folder.glob("checkpoint-*"))]
    return f"{steps} of {RUN['tokens'] // RUN['batch_size']} steps, {saved[-1] if saved else 'no checkpoint'}"


def _same(place: Path, whole: Path, name: str) -> bool:
    """Whether two runs ended with the same bits."""
    file = f"run/{name}/{RUN['hookpoints'][0]}/model.safetensors"
    one, other = load_file(place / file), load_file(whole / file)
    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
