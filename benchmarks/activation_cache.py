"""Bytes per second out of an activation cache, in shuffled windows, against sequential reads of the same files.

    python benchmarks/activation_cache.py
    python benchmarks/activation_cache.py --width 4096 --rows 65536

A cache of random rows is written for each type, and read by: numpy's memory map from the first row to the last, copied
batch by batch into torch tensors, in one process (the measure of all) and in two, each with its half of the shards;
`CachedActivationStream`, in one process and in two that read disjoint shares. Counted are the bytes of the rows as
tensors of the run's type: what is stored for bf16 and fp32, float32 for int8, whose measure is the map of the fp32
cache. Both put each batch in a new array and drop it before the next, so that its memory is used again as far as the
allocator does so. The clock includes opening the cache. Contenders take turns, so that what else the machine does
weighs on all. Ratios are medians over the turns of a contender's speed over the measure's in the same turn, by the
clock and by the time the processes had a core: where other work fills the cores, two processes get hardly more of them
than one, and only the latter says what they would do alone (waiting for the disk is not in it). Warm: all files have
just been read. Cold: the kernel was asked to drop them (`posix_fadvise`), which a hypervisor's cache below may undo.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_matryoshka_sae.activations import CachedActivationStream, build_cache


HOOKPOINT = "layer"
FINGERPRINT = {"hookpoints": [HOOKPOINT]}
BATCH, BUFFER = 2048, 131_072  # as runs have them by default
MAPPED = {"bf16": np.uint16, "fp32": np.float32}
CONTENDERS = ("map", "map x 2", "ours", "ours x 2")


class Random:
    """What `build_cache` takes rows from."""

    def __init__(self, width: int):
        self.hookpoints, self.batch_size, self.buffer_tokens, self.dtype = [HOOKPOINT], BATCH, BUFFER, torch.float32
        self.width = width

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield {HOOKPOINT: torch.randn(BATCH, self.width)}


def read_map(folder: Path, dtype: str, part: int, parts: int) -> int:
    """Bytes of all batches of some shards, in order."""
    index, read = json.loads((folder / "index.json").read_text()), 0
    for name, shard in list(index["shards"].items())[part::parts]:
        shape = (shard["rows"], index["widths"][HOOKPOINT])
        rows = np.memmap(folder / name, MAPPED[dtype], "r", shard["offsets"][HOOKPOINT], shape)
        for start in range(0, len(rows), BATCH):
            read += torch.from_numpy(np.array(rows[start : start + BATCH])).nbytes
    return read


def read_ours(folder: Path, dtype: str, part: int, parts: int) -> int:
    """Bytes of an epoch of whole batches."""
    stream = CachedActivationStream(
        folder, FINGERPRINT, [HOOKPOINT], BATCH, BUFFER, rank=part, world_size=parts, stored_as=dtype
    )
    return sum(next(stream)[HOOKPOINT].nbytes for _ in range(stream.num_cached // parts // BATCH))


def work(pipe) -> None:
    """A process that reads what it is told to, when both are ready."""
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        read, folder, dtype, part, parts, barrier_at = job
        time.sleep(max(0.0, barrier_at - time.time()))
        start, used = time.time(), time.process_time()
        count = read(folder, dtype, part, parts)
        pipe.send((count, start, time.time(), time.process_time() - used))


def measure(pipes, contender: str, folder: Path, dtype: str, of: Path) -> list[float]:
    """Bytes per second: of each process, of all together, and of all if each had a core to itself."""
    parts = 2 if contender.endswith("x 2") else 1
    read, place = (read_map, of) if contender.startswith("map") else (read_ours, folder)
    kind = ("fp32" if dtype == "int8" else dtype) if read is read_map else dtype
    start = time.time() + 0.05
    for part in range(parts):
        pipes[part].send((read, place, kind, part, parts, start))
    found = [pipes[part].recv() for part in range(parts)]
    each = [count / (end - begin) for count, begin, end, _ in found]
    whole = max(end for _, _, end, _ in found) - min(begin for _, begin, _, _ in found)
    return [*each, sum(count for count, *_ in found) / whole, sum(count / used for count, _, _, used in found)]


def forget(*folders: Path) -> None:
    """Have the kernel drop the files' pages."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(*folders: Path) -> None:
    """Read the files."""
    for folder in folders:
        for path in folder.iterdir():
            path.read_bytes()


def build(folder: Path, dtype: str, args: argparse.Namespace) -> None:
    build_cache(folder, Random(args.width), args.rows, FINGERPRINT, dtype=dtype)
    index = json.loads((folder / "index.json").read_text())
    sys.stdout.write(f"{dtype}: {sum(s['bytes'] for s in index['shards'].values()) / 1e6:,.0f} MB, ")
    sys.stdout.write(f"error (FVU) {index['errors'][HOOKPOINT]:.2g}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2**18)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure (default: temporary files)")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=work, args=(end,), daemon=True) for _, end in ends]
    for process in processes:
        process.start()
    pipes = [pipe for pipe, _ in ends]
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folders = {dtype: Path(place) / dtype for dtype in ("bf16", "fp32", "int8")}
        for dtype, folder in folders.items():
            build(folder, dtype, args)
        os.sync()
        jobs = [(state, dtype) for state in ("warm", "cold") for dtype in folders]
        found = {job: {contender: [] for contender in CONTENDERS} for job in jobs}
        for _ in tqdm(range(args.repeats), desc="turns"):
            for state, dtype in jobs:
                folder, of = folders[dtype], folders["fp32" if dtype == "int8" else dtype]
                for contender in CONTENDERS:
                    remember(folder, of) if state == "warm" else forget(folder, of)
                    found[state, dtype][contender].append(measure(pipes, contender, folder, dtype, of))
    for pipe in pipes:
        pipe.send(None)
    write(found)


def write(found: dict) -> None:
    """The table: medians of GB/s and of ratios to the map in one process."""
    sys.stdout.write(
        "\n| | stored | reader | each, GB/s | together, GB/s | each / map | together / map | by core time |\n"
    )
    sys.stdout.write("|---|---|---|---:|---:|---:|---:|---:|\n")
    for (state, dtype), contenders in found.items():
        clock, core = ([runs[i] for runs in contenders["map"]] for i in (-2, -1))
        for contender, runs in contenders.items():
            *each, together, alone = zip(*runs, strict=True)
            row = [state, dtype, contender]
            row += [", ".join(f"{statistics.median(column) / 1e9:.2f}" for column in each)]
            row += [f"{statistics.median(together) / 1e9:.2f}"]
            row += [", ".join(_ratio(column, clock) for column in each), _ratio(together, clock), _ratio(alone, core)]
            sys.stdout.write(f"| {' | '.join(row)} |\n")


def _ratio(values: Sequence[float], of: Sequence[float]) -> str:
    return f"{statistics.median(value / other for value, other in zip(values, of, strict=True)):.2f}"


if __name__ == "__main__":
    main()
