"""`matryoshka-sae cache`: harvest a run's hidden states once, for any number of runs and machines."""

import argparse
import sys
import time

from ..activations import build_cache, has_cache
from ..activations.cache.format import STORED_DTYPES, read_index
from ..activations.cache.reader import checked_index
from ..activations.cache.storage import CacheStorage
from ..activations.cache.writer import missing_writers
from ..common.command import exit_status
from ..common.logs import log_to_stderr
from .config.run import calibration_tokens, load_run_config
from .data.placement import Processes
from .data.text import TextSource
from .run.trainer import make_accelerator


def main(arguments: list[str] | None = None) -> int:
    """Build or describe a cache as command-line arguments say; returns the exit status."""
    parser = _parser()
    parsed, flags = parser.parse_known_args(arguments)
    if (parsed.config is None) == (parsed.info is None):
        parser.error("give either --config, to build a cache, or --info, to look at one")
    if parsed.info is not None and flags:
        parser.error(f"{flags[0]} means nothing beside --info")
    log_to_stderr()
    return exit_status(
        lambda: _info(parsed.info) if parsed.info is not None else _build(parsed, flags),
        "Stopped. The same command starts this part over; complete parts stay.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae cache",
        description="Harvest the hidden states of a run once. Runs then read them with `activation_cache: FOLDER`. A "
        "part that was interrupted starts over; parts that are complete stay.",
        epilog="Every field of the YAML file is a flag too, for example --context_length 256.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="fields of a training run")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where to, also s3:// and the like (default: the run's `activation_cache`)"
    )
    parser.add_argument(
        "--dtype", choices=STORED_DTYPES, help="how rows are stored (default: as the language model gives them)"
    )
    parser.add_argument(
        "--tokens",
        type=float,
        help="rows in all parts together (default: `tokens` and `calibration_tokens` of the run)",
    )
    parser.add_argument("--shard", type=int, default=0, metavar="i", help="write part i, from 0 on, of --of")
    parser.add_argument("--of", type=int, default=1, metavar="n", help="parts, each by a launch of its own")
    parser.add_argument("--info", metavar="FOLDER", help="build nothing, tell what a cache is and check its files")
    return parser


def _build(parsed: argparse.Namespace, flags: list[str]) -> None:
    config = load_run_config(parsed.config, flags).check_text()
    place = parsed.output or config.activation_cache
    if place is None:
        raise ValueError("Say where to: --output FOLDER, or `activation_cache` in the YAML file.")
    if not 0 <= parsed.shard < parsed.of:
        raise ValueError(f"--shard must lie between 0 and --of - 1 = {parsed.of - 1}, got {parsed.shard}.")
    accelerator = make_accelerator(config)
    # Each part may itself be written by the processes of a launch.
    rank = parsed.shard * accelerator.num_processes + accelerator.process_index
    writers = parsed.of * accelerator.num_processes
    tokens = int(parsed.tokens or config.tokens + calibration_tokens(config))
    if tokens < writers:
        raise ValueError(f"--tokens must be at least 1 for each of {writers} writers, got {tokens}.")
    source = TextSource(config, accelerator, Processes(rank, writers, writers, writers, config.batch_size, ()))
    live, fingerprint = source.live_stream(config.batch_size, rank, writers)
    dtype = parsed.dtype or config.activation_cache_dtype
    began = time.monotonic()
    if has_cache(place):
        checked_index(CacheStorage(place), fingerprint, dtype)
    else:
        build_cache(place, live, -(-tokens // writers), fingerprint, rank, writers, dtype)
    if accelerator.is_main_process:
        sys.stdout.write(f"{describe(CacheStorage(place))}{time.monotonic() - began:.0f} s\n")


def _info(place: str) -> None:
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
