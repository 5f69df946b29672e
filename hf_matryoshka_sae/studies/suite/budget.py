"""Running the sections: what is done is kept, what time is left is shared out, and what was cut is told.

With a budget every section is first run at its least size, fidelity before all and cheap ones before dear: no section
gets more before each has had its least. Then the time that is left is shared among those that a larger size would do
good, and what one does not use goes to the others; a section is run again at the size that fits, if that is half as
much again, else the first result stands. A section ends when the time does (of several processes none does: they would
stop at different places): a budget below what the least sizes need leaves out the dear ones, and the report says so.
What is not defined for these SAEs or this text says so itself, and costs next to nothing.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ...common.distributed import processes
from ...common.files import write_json
from ...common.logs import OutOfTime, within
from .bench import Bench, Outcome
from .sections import Section


_WORTH_IT = 1.5  # times the least size; below that another run only costs time
_AIM, _MOST = 0.8, 1.5  # of a section's share of time: what a larger size is chosen to take, and where it is given up


def run_sections(
    bench: Bench,
    folder: Path,
    sections: Sequence[Section],
    key: dict[str, Any],
    minutes: float | None = None,
    show: bool = True,
    spent: float = 0.0,
) -> list[dict[str, Any]]:
    """Run the sections whose results are not in the folder yet.

    Args:
        bench ([`Bench`]): What to evaluate.
        folder (`Path`): Gets `<section>.json` and `<section>.png`, as soon as each is done.
        sections (`Sequence[Section]`): In this order.
        key (`dict`): What the results depend on, JSON-able; results of another key are made anew.
        minutes (`float`, *optional*): To spend, those of results in the folder included. By default full sizes.
        show (`bool`, *optional*, defaults to `True`): Show progress bars in the main process.
        spent (`float`, *optional*, defaults to 0.0): Seconds of the budget that are gone already.

    Returns:
        `list[dict]`: For each section `name`, `title`, `about`, `columns`, `rows`, `text`, `notes`, `facts`, `size`,
        `full`, `unit`, `seconds`, `plot` (a file's name or `None`); and `left_out`, the reason, where nothing was run.

    Raises:
        `ValueError`: if the budget is not above 0, or the first section refuses what it is given; what a later one
            refuses is left out, with the reason.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"`minutes` must be above 0, got {minutes:g}.")
    run = _Run(bench, folder, key, minutes, spent)
    kept = {section.name: _read(folder, section, key) for section in sections} if run.main else {}
    (kept,) = broadcast_object_list([kept]) if run.several else [kept]
    run.results = {name: result for name, result in kept.items() if result}
    run.before += sum(result["seconds"] for result in run.results.values())
    show = show and run.main
    cheap_first = sorted(sections, key=lambda section: (section is not sections[0], section.cost))
    bar = tqdm(cheap_first, disable=not show, unit="section")
    for section in bar:
        bar.set_description(section.title)
        if section.name not in run.results:
            # What the first section refuses is refused; a later one may not be defined for these SAEs and this text.
            run.least(section, needed=section is sections[0])
    if minutes is not None:
        growing = [section for section in sections if run.can_grow(section)]
        bar = tqdm(growing, disable=not show, unit="section")
        for number, section in enumerate(bar):
            bar.set_description(section.title)
            run.grow(section, sum(each.share for each in growing[number:]))
    return [run.results[section.name] for section in sections]


class _Run:
    """What was found so far, and what may still be spent."""

    def __init__(
        self, bench: Bench, folder: Path, key: dict[str, Any], minutes: float | None, spent: float = 0.0
    ) -> None:
        self.bench, self.folder, self.key, self.minutes = bench, folder, key, minutes
        self.before, self.began = spent, time.monotonic()
        self.main, self.several = processes()[0] == 0, processes()[1] > 1
        self.results: dict[str, dict[str, Any]] = {}

    @property
    def left(self) -> float:
        """Seconds of the budget that are not spent, drawing included; the main process's clock counts."""
        spent = self.before + time.monotonic() - self.began
        return _agreed(60 * (self.minutes or 0) - spent, self.several)

    def least(self, section: Section, needed: bool) -> None:
        """Run a section at its least size, or without a budget at its full one."""
        if self.minutes is not None and self.left <= 0:
            self.results[section.name] = self._about(section, 0, 0.0) | {"rows": {}, "left_out": "no time was left"}
            return
        began = time.monotonic()
        size = section.full if self.minutes is None else section.least
        try:
            with within(self._until(1.0)):
                outcome = section.run(self.bench, size)
        except (ValueError, OutOfTime) as error:
            if needed and isinstance(error, ValueError):
                raise
            taken = time.monotonic() - began
            reason = str(error) or f"it was not done in the {taken:.0f} s that were left"
            self.results[section.name] = self._about(section, 0, taken) | {"rows": {}, "left_out": reason}
            return
        grown = self.minutes is None or size == section.full
        self._keep(section, size, time.monotonic() - began, outcome, grown)

    def can_grow(self, section: Section) -> bool:
        """Return whether a section has been run at its least size alone."""
        result = self.results[section.name]
        return not result.get("left_out") and not result["grown"]

    def grow(self, section: Section, waiting: float) -> None:
        """Run a section again at the size that its share of the time allows; `waiting` shares are not spent yet."""
        result = self.results[section.name]
        allowed = self.left * section.share / waiting
        times = max(0.0, _AIM * allowed / max(result["seconds"], 1e-9)) ** (1 / section.growth)
        larger = int(min(section.full, result["size"] * times))
        if larger < _WORTH_IT * result["size"]:
            return
        began = time.monotonic()
        try:
            with within(self._until(_MOST * allowed / self.left)):
                anew = section.run(self.bench, larger)
        except OutOfTime:
            result["seconds"] += time.monotonic() - began
            return
        self._keep(section, larger, result["seconds"] + time.monotonic() - began, anew, grown=True)

    def _until(self, share: float) -> float | None:
        """Return the seconds after which a section is given up: a share of those left, and no more than these."""
        return None if self.minutes is None or self.several else min(1.0, share) * self.left

    def _about(self, section: Section, size: int, seconds: float) -> dict[str, Any]:
        return {
            "key": digest(self.key, section),
            "name": section.name,
            "title": section.title,
            "question": section.question,
            "about": section.about,
            "columns": section.columns,
            "better": section.better,
            "beats_random": section.beats_random,
            "unit": section.unit,
            "full": section.full,
            "size": size,
            "seconds": seconds,
        }

    def _keep(self, section: Section, size: int, seconds: float, outcome: Outcome, grown: bool) -> None:
        result = self._about(section, size, seconds) | {"grown": grown}
        if self.main:
            _write(self.folder, result, outcome)
        self.results[section.name] = {**result, **_kept(result, outcome)}


def _read(folder: Path, section: Section, key: dict[str, Any]) -> dict[str, Any] | None:
    """A section's result, if it is one of this key and whole."""
    try:
        result = json.loads((folder / f"{section.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("key") != digest(key, section):
        return None
    if result["plot"] is not None and not (folder / result["plot"]).is_file():
        return None
    return {name: value for name, value in result.items() if name != "details"}


def digest(key: dict[str, Any], section: Section) -> str:
    """Of what a section's result depends on."""
    content = json.dumps([key, section.name, section.least, section.full], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _agreed(value: Any, several: bool) -> Any:
    """The main process's value: clocks differ, and all must do the same."""
    return broadcast_object_list([value])[0] if several else value


def _kept(result: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    plot = None if outcome.plot is None else f"{result['name']}.png"
    return {"rows": outcome.rows, "text": outcome.text, "notes": outcome.notes, "facts": outcome.facts, "plot": plot}


def _write(folder: Path, result: dict[str, Any], outcome: Outcome) -> None:
    kept = _kept(result, outcome)
    if outcome.plot is not None:
        outcome.plot(folder / kept["plot"])
    write_json(folder / f"{result['name']}.json", {**result, **kept, "details": outcome.details})
