"""The full evaluation: every section one after the other, within a budget, resumable, as one report."""

from .bench import Bench, Outcome
from .budget import run_sections
from .report import FOLDER, SUITE_FILE, write_report
from .sections import SECTIONS, Section


__all__ = ["FOLDER", "SECTIONS", "SUITE_FILE", "Bench", "Outcome", "Section", "run_sections", "write_report"]
