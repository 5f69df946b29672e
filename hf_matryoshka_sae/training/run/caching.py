"""What `matryoshka-sae cache` does: harvest a run's hidden states once, for any number of runs and machines."""

import sys
import time

from ...activations import build_cache, has_cache
from ...activations.cache.format import read_index
from ...activations.cache.reader import checked_index
from ...activations.cache.storage import CacheStorage
from ...activations.cache.writer import missing_writers
from ..config.run import RunConfig, calibration_tokens
from ..data.placement import Processes
from ..data.text import TextSource
from .trainer import make_accelerator


def build(config: RunConfig, tokens: float | None, shard: int, of: int) -> None:
    """Write one part of a run's cache, unless a whole one is there, and print what there is of it.

    Args:
        config ([`RunConfig`]): With `activation_cache`.
        tokens (`float`, *optional*): Rows of all parts; by default what the run trains and calibrates on.
        shard (`int`): Number of this part.
        of (`int`): Number of parts, each written by a launch of its own.
    """
    accelerator = make_accelerator(config)
    # Each part may itself be written by the processes of a launch.
    rank = shard * accelerator.num_processes + accelerator.process_index
    writers = of * accelerator.num_processes
    tokens = int(tokens or config.tokens + calibration_tokens(config))
    if tokens < writers:
        raise ValueError(f"--tokens must be at least 1 for each of {writers} writers, got {tokens}.")
    source = TextSource(config, accelerator, Processes(rank, writers, writers, writers, config.batch_size, ()))
    live, fingerprint = source.live_stream(config.batch_size, rank, writers)
    place, dtype = config.activation_cache, config.activation_cache_dtype
    began = time.monotonic()
    if has_cache(place):
        checked_index(CacheStorage(place), fingerprint, dtype)
    else:
        build_cache(place, live, -(-tokens // writers), fingerprint, rank, writers, dtype)
    if accelerator.is_main_process:
        sys.stdout.write(f"{describe(CacheStorage(place))}{time.monotonic() - began:.0f} s\n")


def inspect(place: str) -> None:
    """Print what a cache is. Raises `ValueError` where files or parts are missing, or were cut."""
    storage = CacheStorage(place)
    if has_cache(place):
        index = read_index(storage)
        sys.stdout.write(describe(storage))
        sys.stdout.writelines(f"{name}: {value}\n" for name, value in index.fingerprint.items())
        damaged = index.damaged(storage)
        if damaged is not None:
            raise ValueError(f"'{damaged}' is missing or has not the size it had when the cache was written.")
        sys.stdout.write(f"All {len(index.shards)} shards have their sizes.\n")
    elif missing_writers(storage):
        raise ValueError(describe(storage).rstrip())
    else:
        read_index(storage)  # says what is wrong


def describe(storage: CacheStorage) -> str:
    """What there is of a cache, in lines of text: rows, size, type and error, or the parts that are missing."""
    missing = missing_writers(storage)
    if missing:
        parts = ", ".join(map(str, missing))
        return f"{storage}: not complete; --shard {parts} {'has' if len(missing) == 1 else 'have'} not ended\n"
    index = read_index(storage)
    lines = [f"{storage}: {index.rows:,} rows, {index.bytes / 1e6:,.1f} MB, {index.dtype}"]
    lines += [
        f"  {name}: d {index.widths[name]}, relative squared error (FVU) {error:.3g}"
        for name, error in index.errors.items()
    ]
    return "\n".join(lines) + "\n"
