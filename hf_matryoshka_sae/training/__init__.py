"""Train SAEs: losses, schedules, the Accelerate trainer, checkpoints, the closing report."""

from .config import RunConfig, SAESpec, load_run_config
from .trainer import Interrupted, train
from .watchdog import LostProcess


__all__ = ["Interrupted", "LostProcess", "RunConfig", "SAESpec", "load_run_config", "train"]
