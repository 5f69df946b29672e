"""Running the sections: what is done is kept, what time is left is shared out, and what was cut is told.

With a budget each section is run at its least size first. If by that the time it may take allows a larger one, it is
run again at the size that fits; else the first result stands. Sections without a size are run if any time is left. A
section that runs is not cut off, so a budget far below what the least sizes need is overrun, and the report says so.
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
from .bench import Bench, Found
from .sections import Section


_WORTH_IT = 1.5  # times the least size; below that another run only costs time


def run_sections(
    bench: Bench,
    folder: Path,
    sections: Sequence[Section],
    key: dict[str, Any],
    minutes: float | None = None,
    show: bool = True,
) -> list[dict[str, Any]]:
    """Run the sections whose results are not in the folder yet.

    Args:
        bench ([`Bench`]): What to evaluate.
        folder (`Path`): Gets `<section>.json` and `<section>.png`, as soon as each is done.
        sections (`Sequence[Section]`): In this order.
        key (`dict`): What the results depend on, JSON-able; results of another key are made anew.
        minutes (`float`, *optional*): To spend, those of results in the folder included. By default full sizes.
        show (`bool`, *optional*, defaults to `True`): Show progress bars in the main process.

    Returns:
        `list[dict]`: For each section `name`, `title`, `about`, `columns`, `rows`, `text`, `notes`, `facts`, `size`,
        `full`, `unit`, `seconds`, `plot` (a file's name or `None`); and `left_out`, the reason, where nothing was run.

    Raises:
        `ValueError`: if the budget is not above 0, or the first section refuses what it is given; what a later one
            refuses is left out, with the reason.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"`minutes` must be above 0, got {minutes:g}.")
    main, several = processes()[0] == 0, processes()[1] > 1
    kept = {section.name: _read(folder, section, key) for section in sections} if main else {}
    (kept,) = broadcast_object_list([kept]) if several else [kept]
    spent = sum(found["seconds"] for found in kept.values() if found)
    results: list[dict[str, Any]] = []
    bar = tqdm(sections, disable=not (show and main), unit="section")
    for number, section in enumerate(bar):
        bar.set_description(section.title)
        found = kept[section.name]
        if found is None:
            waiting = sum(each.share for each in sections[number:] if kept[each.name] is None)
            allowed = None if minutes is None else (minutes * 60 - spent) * section.share / waiting
            # What the first section refuses is refused; a later one may not be defined for these SAEs and this text.
            found = _run(bench, section, allowed, folder, key, several, needed=number == 0)
            spent += found["seconds"]
        results.append(found)
    return results


def _read(folder: Path, section: Section, key: dict[str, Any]) -> dict[str, Any] | None:
    """A section's result, if it is one of this key and whole."""
    try:
        found = json.loads((folder / f"{section.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("key") != digest(key, section):
        return None
    if found["plot"] is not None and not (folder / found["plot"]).is_file():
        return None
    return {name: value for name, value in found.items() if name != "details"}


def digest(key: dict[str, Any], section: Section) -> str:
    """Of what a section's result depends on."""
    told = json.dumps([key, section.name, section.least, section.full], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _run(
    bench: Bench,
    section: Section,
    allowed: float | None,
    folder: Path,
    key: dict[str, Any],
    several: bool,
    needed: bool,
) -> dict[str, Any]:
    """One section at the size that the time allows; written down."""
    about = {
        "key": digest(key, section),
        "name": section.name,
        "title": section.title,
        "about": section.about,
        "columns": section.columns,
        "unit": section.unit,
        "full": section.full,
    }
    began = time.monotonic()
    if _told(allowed is not None and allowed <= 0, several):
        return {**about, "size": 0, "seconds": 0.0, "rows": {}, "left_out": "no time was left"}
    size = section.full if allowed is None else section.least
    try:
        found = section.run(bench, size)
    except ValueError as error:
        if needed:
            raise
        return {**about, "size": 0, "seconds": time.monotonic() - began, "rows": {}, "left_out": str(error)}
    taken = time.monotonic() - began
    larger = min(section.full, int(section.least * (allowed - taken) / taken)) if allowed is not None else 0
    larger = _told(larger, several)
    if larger >= _WORTH_IT * size:
        size, found = larger, section.run(bench, larger)
    result = {**about, "size": size, "seconds": time.monotonic() - began}
    if processes()[0] == 0:
        _write(folder, result, found)
    return {**result, **_kept(result, found)}


def _told(value: Any, several: bool) -> Any:
    """The main process's value: clocks differ, and all must do the same."""
    return broadcast_object_list([value])[0] if several else value


def _kept(result: dict[str, Any], found: Found) -> dict[str, Any]:
    plot = None if found.plot is None else f"{result['name']}.png"
    return {"rows": found.rows, "text": found.text, "notes": found.notes, "facts": found.facts, "plot": plot}


def _write(folder: Path, result: dict[str, Any], found: Found) -> None:
    kept = _kept(result, found)
    if found.plot is not None:
        found.plot(folder / kept["plot"])
    write_json(folder / f"{result['name']}.json", {**result, **kept, "details": found.details})
