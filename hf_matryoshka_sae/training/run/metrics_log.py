"""`metrics.jsonl` and the trackers."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...common.files import as_json
from ..config.run import RunConfig
from ..config.trackers import TrackedRun, lasting_id, open_trackers


# What of the held-out results is logged, by the name of its curve.
_HELD_OUT = {"fvu": "fvu", "l0": "l0", "ce": "ce", "recaptured_zero": "recaptured", "dead": "dead"}


class MetricsLog:
    """Writes a line per logged step; a resumed run drops the lines past its checkpoint first.

    Args:
        accelerator (`Accelerator`): Its main process writes, its trackers are fed.
        folder (`Path`): The run's folder.
        config ([`RunConfig`]): Shown to the trackers.
        start (`int`): Steps already done.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, config: RunConfig, start: int) -> None:
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        if config.trackers:
            id = lasting_id(folder, start) if accelerator.is_main_process else ""
            run = TrackedRun(config.project, folder, _flat(config.to_dict()), start, id)
            open_trackers(accelerator, config.trackers, run)
        self.file = None
        if accelerator.is_main_process:
            self._keep_until(start)
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)

    def _keep_until(self, start: int) -> None:
        kept = []
        if start and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError):
                    break  # the line that was being written when the run was killed
                if step <= start:
                    kept.append(line + "\n")
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
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
            curves = {name: _by_width(values) for name, values in statistics.items()}
            self.accelerator.log(_flat({**common, **curves}), step=step)

    def write_results(self, step: int, results: Sequence[Mapping[str, Any]]) -> None:
        """Give the trackers what the run is worth on held-out text.

        Args:
            step (`int`): The last one.
            results (`Sequence[dict]`): What [`report.evaluate`] gives, for each hookpoint.
        """
        if not self.accelerator.trackers:
            return
        several = len(results) > 1
        curves: dict[str, Any] = {}
        for result in results:
            for name, rows in result["saes"].items():
                place = f"{name}/{result['hookpoint']}" if several else name
                for row in rows:
                    for key, curve in _HELD_OUT.items():
                        if row.get(key) is not None:
                            curves[f"{place}/heldout_{curve}/{row['width']}"] = row[key]
        self.accelerator.log(curves, step=step)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.file is not None:
            self.file.close()
        if self.accelerator.trackers:
            self.accelerator.end_training()


def _by_width(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """A step's statistics with the errors of prefixes by their widths, and only the last where widths are random."""
    curves, fvu = dict(statistics), statistics["fvu"]
    widths = curves.pop("widths")
    curves["fvu"] = {"whole": fvu[-1]} if widths is None else {str(w): one for w, one in zip(widths, fvu, strict=True)}
    return curves


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
