"""The report of a full evaluation: `report.md` with plots, and `suite.json`, from which model cards are filled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.files import write_json, write_text
from ...common.report import markdown_table


FOLDER = "evaluation_suite"
SUITE_FILE = "suite.json"

FLAT = {"neurons": "neurons", "channels": "channels", "all channels": "all channels"}
"""Baselines that have one number for all widths, and what the tables call them."""

_LESS = 90  # per cent of the full size: below that a cut is told


def write_report(folder: Path, places: Sequence[dict[str, Any]], minutes: float | None) -> Path:
    """Write `report.md` and `suite.json`.

    Args:
        folder (`Path`): In it lie the sections' folders.
        places (`Sequence[dict]`): For each hookpoint `model`, `hookpoint`, `dataset`, `tokens`, `saes` (names),
            `weights` (digests by name, where they are known), `folder` (of its sections, relative) and `sections`.
        minutes (`float`, *optional*): The budget.

    Returns:
        `Path`: That of `report.md`.
    """
    kept = ("name", "title", "about", "columns", "rows", "facts", "size", "full", "unit", "seconds", "notes")
    kept += ("left_out", "plot")
    told = [
        {**place, "sections": [{key: each[key] for key in kept if key in each} for each in place["sections"]]}
        for place in places
    ]
    write_json(folder / SUITE_FILE, {"minutes": minutes, "places": told})
    parts = ["# What these SAEs are worth", _time(places, minutes)]
    for place in places:
        parts += _place(place)
    path = folder / "report.md"
    write_text(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


def _time(places: Sequence[dict[str, Any]], minutes: float | None) -> str:
    """What each section took, what was asked, and what was cut for it."""
    sections = [section for place in places for section in place["sections"]]
    whole = sum(section["seconds"] for section in sections)
    each = ", ".join(f"{section['name']} {section['seconds']:.0f} s" for section in sections)
    text = f"Measured in {whole / 60:.1f} minutes ({each})"
    text += "." if minutes is None else f", of {minutes:g} that were asked for."
    lines = [f"- {line}" for line in cuts(sections)]
    return text if not lines else f"{text}\n\nCut to fit the time:\n\n" + "\n".join(lines)


def cuts(sections: Sequence[dict[str, Any]]) -> list[str]:
    """What is smaller than it would have been without a budget."""
    lines = []
    for section in sections:
        if section.get("left_out"):
            lines.append(f"{section['title']}: left out, {section['left_out']}")
        elif section["size"] * 100 < section["full"] * _LESS:
            lines.append(
                f"{section['title']}: about {section['size']:,} {section['unit']} instead of {section['full']:,}"
            )
    return lines


def _place(place: dict[str, Any]) -> list[str]:
    parts = [
        f"## {place['model']}, {place['hookpoint']}",
        f"{place['tokens']:,} held-out tokens of `{place['dataset']}`, of which each section takes some from all over "
        f"the text; selection {place['selection']} where nothing else is said. random: a dictionary of random "
        "directions that fires as often. In brackets 95% intervals, and the width of what has but one.",
        *(summary(place, name) for name in place["saes"]),
    ]
    for section in place["sections"]:
        parts += [f"### {section['title']}", section["about"]]
        if section.get("left_out"):
            parts.append(f"Left out: {section['left_out']}.")
            continue
        parts += [f"**{note}**" for note in section["notes"] if note not in section["text"]]
        parts.append(f"```text\n{section['text']}\n```")
        if section["plot"]:
            path = "/".join(filter(None, (place["folder"], section["plot"])))
            parts.append(f"![{section['title']}]({path})")
    return parts


def summary(place: dict[str, Any], name: str) -> str:
    """A table of the main metrics of one SAE at every width, each beside its baselines."""
    widths = sorted({row["width"] for each in place["sections"] for row in each["rows"].get(name, [])})
    lines = []
    for section in place["sections"]:
        for key, title, form in section["columns"]:
            lines += metric_lines(section["rows"], name, key, title, form, widths)
    if not lines:
        return ""
    table = markdown_table(["metric", "", *(f"{width:,}" for width in widths)], lines, right=2)
    notes = [f"- {each['title']}: {note}" for each in place["sections"] for note in each.get("notes", [])]
    return "\n\n".join(filter(None, [f"**{name}**", table, "\n".join(notes)]))


def metric_lines(
    rows: dict[str, list[dict[str, Any]]], name: str, key: str, title: str, form: str, widths: Sequence[int]
) -> list[list[str]]:
    """One metric of an SAE, of its random dictionary, and of baselines that have one number for all widths."""
    lines = []
    for subject, label in ((name, "**SAE**"), (f"random ({name})", "random"), *FLAT.items()):
        found = {row["width"]: row for row in rows.get(subject, []) if row.get(key) is not None}
        if not found:
            continue
        if subject in FLAT:
            (last, *_) = list(found.values())[::-1]
            cells = ["", *[""] * (len(widths) - 2), cell(last, key, form)][-len(widths) :]
        else:
            cells = [cell(found[width], key, form) if width in found else "" for width in widths]
        if subject in FLAT:
            label = f"{label} ({list(found)[-1]:,})"
        lines.append(["" if lines else title, label, *cells])
    return lines


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A value with its interval."""
    text = format(row[key], form)
    interval = row.get(f"{key}_interval")
    return text if not interval or None in interval else f"{text} [{interval[0]:{form}} {interval[1]:{form}}]"
