"""Train SAEs: losses, schedules, the Accelerate trainer, checkpoints, the closing report."""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from .config.run import RunConfig, load_run_config
    from .config.spec import SAESpec
    from .run.trainer import Interrupted, train
    from .run.watchdog import LostProcess
    from .sae.growth import grow


__all__ = ["Interrupted", "LostProcess", "RunConfig", "SAESpec", "grow", "load_run_config", "train"]

__getattr__, __dir__ = imports_on_use(__name__)
