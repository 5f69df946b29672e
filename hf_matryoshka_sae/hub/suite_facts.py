"""Results of a full evaluation for an SAE's card, from the report in the run's folder or in the SAE's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..studies.suite import FOLDER, SUITE_FILE
from ..studies.suite.report import metric_lines
from .measure import read_json


FIDELITY = "fidelity"


@dataclass
class SuiteFacts:
    """The part of a full evaluation that is about one SAE.

    Args:
        name (`str`): Name of the SAE in the evaluation.
        place (`dict`): Results of the hookpoint: language model, text, and `sections`.
        folder (`Path`): The evaluation's folder, which holds a folder of plots for each hookpoint.
    """

    name: str
    place: dict[str, Any]
    folder: Path

    @property
    def sections(self) -> list[dict[str, Any]]:
        """Sections with rows of the SAE, without reconstruction, which the card's own tables show."""
        sections = [each for each in self.place["sections"] if each["name"] != FIDELITY]
        return [each for each in sections if each["rows"].get(self.name)]

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """Section on reconstruction; `None` where it has no rows of the SAE."""
        sections = (each for each in self.place["sections"] if each["name"] == FIDELITY)
        return next((each for each in sections if each["rows"].get(self.name)), None)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and cells of a table: every metric at every width, beside its baselines."""
        widths = sorted({row["width"] for each in self.sections for row in each["rows"][self.name]})
        lines = []
        for section in self.sections:
            for key, title, form in section["columns"]:
                lines += metric_lines(section["rows"], self.name, key, title, form, widths)
        return ["Metric", "Of", *(f"{width:,}" for width in widths)], lines

    def baselines(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Return the reconstruction metrics of the baselines, by name and width."""
        rows = {} if self.fidelity is None else self.fidelity["rows"]
        others = {
            "random": f"random ({self.name})",
            "principal components": "principal components",
            "identity": "identity",
        }
        return {title: {row["width"]: row for row in rows[key]} for title, key in others.items() if key in rows}

    def plots(self) -> dict[str, Path]:
        """Return the picture files, by name of the section."""
        paths = {
            each["name"]: self.folder / self.place["folder"] / each["plot"] for each in self.sections if each["plot"]
        }
        return {name: path for name, path in paths.items() if path.is_file()}


def read_suite(folders: Sequence[Path], weights: str | None) -> SuiteFacts | None:
    """Read the evaluation of these weights from the first folder that has one; `None` where none has.

    Args:
        folders (`Sequence[Path]`): Folders that may hold a report: the run's and the SAE's.
        weights (`str`, *optional*): Digest of the weights' files; results of other weights are left out.
    """
    for folder in folders:
        for place in read_json(folder / FOLDER / SUITE_FILE).get("places", []):
            for name, digest in place.get("weights", {}).items():
                if digest is not None and digest == weights:
                    return SuiteFacts(name, place, folder / FOLDER)
    return None
