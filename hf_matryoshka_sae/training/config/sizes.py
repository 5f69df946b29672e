"""How many hidden states a run spends on what is not training, where its fields leave that open.

A short run should not wait longer for its text, normalisation, thresholds and report than for its training, so these
are shares of `tokens`, up to a size that is enough for any run.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .run import RunConfig


_SIZES = ("normalization_tokens", "calibration_tokens", "eval_tokens", "shuffle_tokens", "window_pool_tokens")
_SMALLEST = 4096
LARGEST_POOL = 4_000_000
LARGEST_EVALUATION = 60_000


def normalization_tokens(config: RunConfig) -> int:
    """Hidden states whose mean and scale are measured, over all processes; they are trained on as well."""
    return _size(config.normalization_tokens, config.tokens // 8, 65_536)


def calibration_tokens(config: RunConfig) -> int:
    """Hidden states that thresholds are solved for on, over all processes; they are read for nothing else."""
    return _size(config.calibration_tokens, config.tokens // 5, 200_000)


def eval_tokens(config: RunConfig) -> int:
    """Held-out tokens that dictionaries are measured on at the end."""
    return _size(config.eval_tokens, config.tokens // 4, LARGEST_EVALUATION)


def window_pool_tokens(config: RunConfig, streams: int = 1) -> int:
    """Tokens of text in the pool of each of a run's streams, which is filled before the first forward pass."""
    return _size(config.window_pool_tokens, 8 * config.tokens // streams, LARGEST_POOL)


def shuffle_tokens(config: RunConfig, streams: int = 1) -> int:
    """Hidden states in the shuffle buffer of each of a run's streams.

    A buffer is full before the first step, and what it holds at the end is never used.
    """
    return _size(config.shuffle_tokens, config.tokens // (4 * streams), 131_072)


def _size(given: int | None, share: int, largest: int) -> int:
    return given if given is not None else max(_SMALLEST, min(share, largest))


def with_sizes_of(config: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The run with the sizes that the fields of an earlier one state, where its own fields leave them open."""
    stated = {name: before[name] for name in _SIZES if getattr(config, name) is None and before.get(name) is not None}
    return dataclasses.replace(config, **stated)


def as_begun(config: RunConfig) -> RunConfig:
    """A run with the sizes with which it was begun, where it goes on from a checkpoint in its folder.

    An earlier version wrote them into `run.yaml` whatever the length of the run.
    """
    folder = Path(config.output_dir)
    path = folder / "run.yaml"
    if not (config.resume and path.is_file() and any(folder.glob("checkpoint-*"))):
        return config
    before = yaml.safe_load(path.read_text())
    return with_sizes_of(config, before) if isinstance(before, dict) else config
