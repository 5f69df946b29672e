"""`matryoshka-sae cache`: its arguments, read and checked before anything heavy is imported."""

import argparse

from ..common.command import exit_status
from ..common.logs import log_to_stderr
from .config.run import RunConfig, load_run_config


def main(arguments: list[str] | None = None) -> int:
    """Build or describe a cache as command-line arguments say; returns the exit status."""
    parser = _parser()
    parsed, flags = parser.parse_known_args(arguments)
    if (parsed.config is None) == (parsed.info is None):
        parser.error("give either --config, to build a cache, or --info, to look at one")
    if parsed.info is not None and flags:
        parser.error(f"{flags[0]} means nothing beside --info")
    return exit_status(
        lambda: _run(parsed, flags), "Stopped. The same command starts this part over; complete parts stay."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae cache",
        description="Harvest the hidden states of a run once, to its `activation_cache` (a folder, s3:// and the "
        "like), stored as its `activation_cache_dtype`. Runs with this `activation_cache` then read them. A part that "
        "was interrupted starts over; parts that are complete stay.",
        epilog="Every field of the YAML file is a flag too (`matryoshka-sae train --help`), for example "
        "--activation_cache FOLDER --activation_cache_dtype int8.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="fields of a training run")
    parser.add_argument(
        "--tokens",
        type=float,
        help="rows in all parts together (default: `tokens` and `calibration_tokens` of the run)",
    )
    parser.add_argument("--shard", type=int, default=0, metavar="i", help="write part i, from 0 on, of --of")
    parser.add_argument("--of", type=int, default=1, metavar="n", help="parts, each by a launch of its own")
    parser.add_argument("--info", metavar="FOLDER", help="build nothing, tell what a cache is and check its files")
    return parser


def _run(parsed: argparse.Namespace, flags: list[str]) -> None:
    config = load_run_config(parsed.config, flags, look=lambda run: _check(parsed, run)) if parsed.config else None
    from .run.caching import build, inspect

    log_to_stderr()
    if config is None:
        inspect(parsed.info)
    else:
        build(config, parsed.tokens, parsed.shard, parsed.of)


def _check(parsed: argparse.Namespace, config: RunConfig) -> None:
    config.check_text()
    if config.activation_cache is None:
        raise ValueError("Say where to: --activation_cache FOLDER, or `activation_cache` in the YAML file.")
    if not 0 <= parsed.shard < parsed.of:
        raise ValueError(f"--shard must lie between 0 and --of - 1 = {parsed.of - 1}, got {parsed.shard}.")
