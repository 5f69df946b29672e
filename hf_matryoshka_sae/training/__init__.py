"""Train SAEs: losses, schedules, the Accelerate trainer, checkpoints, the closing report."""

import importlib
from typing import TYPE_CHECKING

from .config.run import RunConfig, load_run_config
from .config.spec import SAESpec


if TYPE_CHECKING:
    from .run.trainer import Interrupted, train
    from .run.watchdog import LostProcess
    from .sae.growth import grow


__all__ = ["Interrupted", "LostProcess", "RunConfig", "SAESpec", "grow", "load_run_config", "train"]

_ON_USE = {"Interrupted": "run.trainer", "LostProcess": "run.watchdog", "grow": "sae.growth", "train": "run.trainer"}


def __getattr__(name: str):
    """What needs torch, imported when it is asked for: fields are read, and what is wrong with them told, before."""
    if name in _ON_USE:
        return getattr(importlib.import_module(f".{_ON_USE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
