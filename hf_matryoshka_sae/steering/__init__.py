"""Latents that change what a language model does: in place, as an artefact, and as files for other tools."""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from .adapters import to_peft
    from .artefact import Steering, steered
    from .change import FORMATS, Change
    from .continuation import Steered, steer
    from .exporting import export
    from .measuring import auto_dose, dose_report
    from .parts import Part
    from .reconstructed import ReconstructedText, reconstruct_text
    from .report import DoseReport


__all__ = [
    "FORMATS",
    "Change",
    "DoseReport",
    "Part",
    "ReconstructedText",
    "Steered",
    "Steering",
    "auto_dose",
    "dose_report",
    "export",
    "reconstruct_text",
    "steer",
    "steered",
    "to_peft",
]

__getattr__, __dir__ = imports_on_use(__name__)
