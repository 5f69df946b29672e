"""The report of a full evaluation: a page of verdict, a page with every table, and `suite.json` for cards."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.figures import draw_widths, save_figure
from ...common.files import write_json, write_text
from ...common.report import markdown_table


FOLDER = "evaluation_suite"
SUITE_FILE, DETAILS, OVERVIEW = "suite.json", "details.md", "overview.png"

FLAT = {
    "neurons": "neurons",
    "hidden-state channels": "channels",
    "all channels together": "all channels",
}
"""Baselines that have one number for all widths, and what the tables call them."""

_LESS = 90  # per cent of the full size: below that a cut is told
_CLEAR = 0.05  # relative difference that counts where there are no intervals
_ACROSS = 3


def write_report(folder: Path, places: Sequence[dict[str, Any]], minutes: float | None) -> Path:
    """Write `report.md`, `details.md`, a picture for each hookpoint, and `suite.json`.

    Args:
        folder (`Path`): In it lie the sections' folders.
        places (`Sequence[dict]`): For each hookpoint `model`, `hookpoint`, `dataset`, `tokens`, `saes` (names),
            `weights` (digests by name, where they are known), `folder` (of its sections, relative) and `sections`.
        minutes (`float`, *optional*): The budget.

    Returns:
        `Path`: That of `report.md`.
    """
    kept = (
        "name title question about columns better beats_random rows facts size full unit seconds notes left_out plot"
    )
    stored = [
        {**place, "sections": [{key: each[key] for key in kept.split() if key in each} for each in place["sections"]]}
        for place in places
    ]
    write_json(folder / SUITE_FILE, {"minutes": minutes, "places": stored})
    details = ["# Every table and plot", _time(places, minutes)]
    page = ["# What these SAEs are worth"]
    for place in places:
        page += _verdict_page(place, folder)
        details += _details(place)
    page.append(
        f"{_time(places, minutes)} Tables at every width, plots and what each figure means: [{DETAILS}]({DETAILS})."
    )
    write_text(folder / DETAILS, "\n\n".join(filter(None, details)) + "\n")
    write_text(folder / "report.md", "\n\n".join(filter(None, page)) + "\n")
    return folder / "report.md"


def _time(places: Sequence[dict[str, Any]], minutes: float | None) -> str:
    """Say what each section took, and what was asked."""
    sections = [section for place in places for section in place["sections"]]
    whole = sum(section["seconds"] for section in sections)
    each = ", ".join(f"{section['name']} {section['seconds']:.0f} s" for section in sections)
    return f"Measured in {whole / 60:.1f} minutes ({each})" + (
        "." if minutes is None else f", of {minutes:g} that were asked for."
    )


def cuts(sections: Sequence[dict[str, Any]]) -> list[str]:
    """Return what was left out, and what is smaller than it would have been without a budget."""
    lines = []
    for section in sections:
        if section.get("left_out"):
            lines.append(f"{section['title']}: left out, {section['left_out']}")
        elif section["size"] * 100 < section["full"] * _LESS:
            lines.append(
                f"{section['title']}: about {section['size']:,} {section['unit']} instead of {section['full']:,}"
            )
    return lines


# The page of verdict


def _verdict_page(place: dict[str, Any], folder: Path) -> list[str]:
    """Return a paragraph and a table for each SAE, a picture with a panel for each question, and what was cut."""
    drawn = [section for section in place["sections"] if section["rows"]]
    parts = [
        f"## {place['model']}, {place['hookpoint']}",
        f"{place['tokens']:,} held-out tokens of `{place['dataset']}`, selection {place['selection']} where nothing "
        "else is said. random: a dictionary of random directions that fires as often. In brackets 95% intervals.",
    ]
    for name in place["saes"]:
        parts += [verdict(place, name), questions(place, name)]
    if drawn:
        path = "/".join(filter(None, (place["folder"], OVERVIEW)))
        _overview(drawn, folder / path)
        parts.append(f"![A panel for each question]({path})")
    lines = [f"- {line}" for line in cuts(place["sections"])]
    return [*parts, *(["Left out, or measured on less:\n\n" + "\n".join(lines)] if lines else [])]


def verdict(place: dict[str, Any], name: str) -> str:
    """Return a paragraph on one SAE: what it keeps, what it does better than random directions, what to beware of."""
    sections = {section["name"]: section for section in place["sections"] if section["rows"].get(name)}
    sentences = [f"**{name}.**"]
    if "fidelity" in sections:
        rows = sections["fidelity"]["rows"][name]
        sentences.append(_keeps(rows[-1], f"All {rows[-1]['width']:,} latents"))
        if len(rows) > 1:
            sentences.append(_keeps(rows[0], f"Its first {rows[0]['width']:,} alone"))
    words: dict[str, list[str]] = {}
    for section in sections.values():
        word = _compared(section, name)
        if word and section["name"] != "fidelity" and section.get("beats_random", True):
            words.setdefault(word, []).append(_inside(section["title"]))
    parts = [
        f"{word} than random directions in {'; '.join(titles)}" for word, titles in words.items() if word != "even"
    ]
    sentences += [f"It does {', '.join(parts)}."] if parts else []
    sentences += (
        [f"No clear difference from random directions in {'; '.join(words['even'])}."] if "even" in words else []
    )
    if "patterns" in sections:
        row = sections["patterns"]["rows"][name][-1]
        best = max(
            (row[key], what) for key, what in (("token_f1", "the last token"), ("pair_f1", "the last two tokens"))
        )
        than = "say less than" if row["f1"] < best[0] else "say more than"
        sentences.append(f"Patterns (F1 {row['f1']:.2f}) {than} a table of {best[1]} ({best[0]:.2f}).")
    if "fidelity" in sections and rows[-1].get("rare") is not None:
        low, high = rows[-1]["rare_interval"] or (rows[-1]["rare"],) * 2
        sentences.append(
            f"About {rows[-1]['rare']:.1%} of its latents ({low:.1%} to {high:.1%}) fire on less than one token in a "
            f"million; {rows[-1]['dead']:.1%} on none of the {sections['fidelity']['facts']['tokens']:,} seen."
        )
    return " ".join(sentences)


def _inside(title: str) -> str:
    """Return a title as it stands inside a sentence."""
    return title if title[1].isupper() else title[0].lower() + title[1:]


def _keeps(row: dict[str, Any], who: str) -> str:
    beginning = f"{who}, {row['l0']:.1f} of them on a token, leave {row['fvu']:.1%} of the variance unexplained"
    if row.get("recaptured_zero") is not None:
        return f"{beginning} and recapture {row['recaptured_zero']:.1%} of the language model's loss."
    if row.get("neighbours") is not None:
        return f"{beginning} and keep {row['neighbours']:.0%} of each text's nearest texts."
    return f"{beginning}."


def _compared(section: dict[str, Any], name: str) -> str | None:
    """Return `better`, `worse` or `even`: the first column at the widest width against random directions."""
    key = section["columns"][0][0]
    key = "fvu" if section["name"] == "fidelity" else key
    rows, random = (_last(section["rows"].get(who, []), key) for who in (name, f"random ({name})"))
    if rows is None or random is None:
        return None
    ends = [row.get(f"{key}_interval") or [row[key], row[key]] for row in (rows, random)]
    (low, high), (least, most) = ends
    if low == high and least == most:
        apart = abs(rows[key] - random[key]) > _CLEAR * max(abs(rows[key]), abs(random[key]))
    else:
        apart = low > most or high < least
    if not apart:
        return "even"
    return "better" if (rows[key] > random[key]) == (section.get("better", "higher") == "higher") else "worse"


def _last(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any] | None:
    return next((row for row in reversed(rows) if row.get(key) is not None), None)


def questions(place: dict[str, Any], name: str) -> str:
    """Return a table with a line for each question: its main figure at the ends, and baselines."""
    lines = []
    for section in place["sections"]:
        rows = section["rows"].get(name, [])
        key, title, form = section["columns"][1 if section["name"] == "fidelity" else 0]
        measured = [row for row in rows if row.get(key) is not None]
        if not measured:
            continue
        first, last = measured[0], measured[-1]
        random = _last(section["rows"].get(f"random ({name})", []), key)
        others = [
            f"{FLAT.get(other, other)}{_of_width(row, other)} {cell(row, key, form, False)}"
            for other, of_other in section["rows"].items()
            if other not in (*place["saes"], "identity") and not other.startswith("random (")
            for row in [_last(of_other, key)]
            if row is not None
        ]
        for more, what in (("token_f1", "last token"), ("pair_f1", "last two")):
            others += [f"table of the {what} {last[more]:{form}}"] if last.get(more) is not None else []
        lines.append(
            [
                section["question"],
                title,
                cell(first, key, form) if first is not last else "",
                cell(last, key, form),
                cell(random, key, form) if random else "-",
                ", ".join(others) or "-",
            ]
        )
    if not lines:
        return ""
    widths = sorted({row["width"] for each in place["sections"] for row in each["rows"].get(name, [])})
    heads = ["", "measured by", f"first {widths[0]:,}", f"all {widths[-1]:,}", "random", "others"]
    return markdown_table(heads, lines, right=2)


def _of_width(row: dict[str, Any], name: str) -> str:
    """Return the width of a baseline that has several, in brackets."""
    return "" if name in FLAT or row["width"] is None else f" ({row['width']:,})"


def _overview(sections: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the main figure of each question against width, intervals and baselines with it."""
    from matplotlib.figure import Figure

    across = min(_ACROSS, len(sections))
    down = -(-len(sections) // across)
    figure = Figure(figsize=(4.6 * across, 3.5 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, section in zip(axes, sections, strict=False):
        key, title, _ = section["columns"][1 if section["name"] == "fidelity" else 0]
        lines = {
            subject: [(row["width"], row[key], row.get(f"{key}_interval")) for row in rows if row.get(key) is not None]
            for subject, rows in section["rows"].items()
            if subject != "identity"
        }
        random = [subject for subject in lines if subject.startswith("random (")]
        flat = [subject for subject, points in lines.items() if subject in FLAT or any(w is None for w, *_ in points)]
        # What does not depend on width is a line: its interval, in the details, can be wider than all else.
        lines |= {name: [(*point[:2], None) for point in lines[name]] for name in flat}
        draw_widths(axis, lines, flat, random)
        axis.set_title(textwrap.fill(section["question"], 46), fontsize=10)
        axis.set_ylabel(f"{title} ({section.get('better', 'higher')} is better)", fontsize=8)
        axis.legend(fontsize=7, framealpha=0.6)
    for axis in axes[len(sections) :]:
        axis.remove()
    save_figure(figure, path)


# The details


def _details(place: dict[str, Any]) -> list[str]:
    parts = [f"## {place['model']}, {place['hookpoint']}"]
    for section in place["sections"]:
        if section.get("left_out"):
            continue
        parts += [f"### {section['title']}", section["about"]]
        parts += [f"**{note}**" for note in section["notes"] if note not in section["text"]]
        parts.append(f"```text\n{section['text']}\n```")
        if section["plot"]:
            path = "/".join(filter(None, (place["folder"], section["plot"])))
            parts.append(f"![{section['title']}]({path})")
    return parts


def metric_lines(
    rows: dict[str, list[dict[str, Any]]], name: str, key: str, title: str, form: str, widths: Sequence[int]
) -> list[list[str]]:
    """Return one metric of an SAE, of its random dictionary, and of baselines with one number for all widths."""
    lines = []
    for subject, label in ((name, "**SAE**"), (f"random ({name})", "random"), *FLAT.items()):
        by_width = {row["width"]: row for row in rows.get(subject, []) if row.get(key) is not None}
        if not by_width:
            continue
        if subject in FLAT:
            (last, *_) = list(by_width.values())[::-1]
            cells = ["", *[""] * (len(widths) - 2), cell(last, key, form)][-len(widths) :]
        else:
            cells = [cell(by_width[width], key, form) if width in by_width else "" for width in widths]
        if subject in FLAT:
            label = f"{label} ({list(by_width)[-1]:,})"
        lines.append(["" if lines else title, label, *cells])
    return lines


def cell(row: dict[str, Any], key: str, form: str, interval: bool = True) -> str:
    """Return a value with its interval."""
    text = format(row[key], form)
    bounds = row.get(f"{key}_interval") if interval else None
    return text if not bounds or None in bounds else f"{text} [{bounds[0]:{form}} {bounds[1]:{form}}]"
