"""Train SAEs: losses, schedules, the Accelerate trainer, checkpoints, the closing report."""

from .config import RunConfig, SAESpec, load_run_config
from .trainer import Interrupted, train


__all__ = ["Interrupted", "RunConfig", "SAESpec", "load_run_config", "train"]
