"""`metrics.jsonl` and the trackers."""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..evaluation.report import as_json
from .config import RunConfig


class MetricsLog:
    """Writes a line per logged step; a resumed run drops the lines past its checkpoint first.

    Args:
        accelerator (`Accelerator`): Its main process writes, its trackers are fed.
        folder (`Path`): The run's folder.
        config ([`RunConfig`]): Shown to the trackers.
        start (`int`): Steps already done.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, config: RunConfig, start: int):
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        if config.trackers:
            accelerator.init_trackers(folder.name, config=_flat(config.to_dict()))
        self.file = None
        if accelerator.is_main_process:
            self._keep_until(start)
            self.file = open(self.path, "a", buffering=1)

    def _keep_until(self, start: int) -> None:
        kept = []
        if start and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError):
                    break  # the line that was being written when the run was killed
                if step <= start:
                    kept.append(line + "\n")
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.path)

    def write(
        self,
        step: int,
        statistics: dict[str, dict[str, Any]],
        tokens_per_second: float,
        skipped: int,
        left_out: int,
    ) -> None:
        """Log what [`Learner.statistics`] gave for each dictionary.

        Args:
            step (`int`): Steps done.
            statistics (`dict`): By name.
            tokens_per_second (`float`): Of this session.
            skipped (`int`): Steps that were left out so far.
            left_out (`int`): Hidden states that were left out so far because they are not finite.
        """
        common = {"tokens_per_second": round(tokens_per_second, 1), "skipped_steps": skipped}
        common["states_left_out"] = left_out
        if self.file is not None:
            self.file.write(as_json({"step": step, **common, "saes": statistics}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(_flat({**common, **statistics}), step=step)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.file is not None:
            self.file.close()
        if self.accelerator.trackers:
            self.accelerator.end_training()


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list):
            value = {str(i): entry for i, entry in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat
