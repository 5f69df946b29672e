"""Train SAEs: losses, schedules, the Accelerate trainer, checkpoints, the closing report."""

import importlib
from typing import TYPE_CHECKING

from .config import RunConfig, SAESpec, load_run_config


if TYPE_CHECKING:
    from .trainer import Interrupted, train
    from .watchdog import LostProcess


__all__ = ["Interrupted", "LostProcess", "RunConfig", "SAESpec", "load_run_config", "train"]

_ON_USE = {"Interrupted": "trainer", "LostProcess": "watchdog", "train": "trainer"}


def __getattr__(name: str):
    """What needs torch, imported when it is asked for: fields are read, and what is wrong with them told, before."""
    if name in _ON_USE:
        return getattr(importlib.import_module(f".{_ON_USE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
