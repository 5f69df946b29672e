"""What a full evaluation is done on, and what a part of it finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...common.report import Report
from ...evaluation.data import HeldOut, windows_of
from ...evaluation.language_model import LossScaling
from ...models import SAEModel
from ..probing.tasks import LabelledTask


Rows = dict[str, list[dict[str, Any]]]
"""By dictionary or baseline, for each width."""


@dataclass
class Bench:
    """What is evaluated, and on what.

    Args:
        data ([`HeldOut`]): Language model and held-out tokens.
        saes (`dict[str, SAEModel]`): By name, all of one hookpoint.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"mask"`): Where a metric can be had with either; see [`Dictionary`].
        labelled (`list[LabelledTask]`, *optional*): Tasks to probe beside those made from the tokens.
        scaling ([`LossScaling`], *optional*): Of the language model's loss.
        judge (`Judge` or `str`, *optional*): Who explains latents; see [`automated_interpretability`].
        prompts (`str`, *optional*): Folder with the judge's.
        answers (`Path`, *optional*): Where its answers are kept.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.
    """

    data: HeldOut
    saes: dict[str, SAEModel]
    widths: Sequence[int] | None = None
    selection: str = "mask"
    labelled: list[LabelledTask] = field(default_factory=list)
    scaling: LossScaling | None = None
    judge: Any = None
    prompts: str | None = None
    answers: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Sections read the same text: its hidden states are harvested once.
        if isinstance(self.data, HeldOut) and self.data.kept_states is None:
            self.data = replace(self.data, kept_states={})

    @cached_property
    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Text to explain latents by, and other text to test that on."""
        batches = self.data.batches
        if len(batches) > 1:
            parts = batches[::2], batches[1::2]
        else:  # by windows
            (batch,) = batches
            parts = tuple([windows_of(batch, slice(start, None, 2))] for start in (0, 1))
        if not all(int(batch.keep.sum()) for part in parts for batch in part[:1]):
            raise ValueError(
                "There is too little held-out text to explain latents by one half and test it on another."
            )
        return tuple(replace(self.data, batches=list(part)) for part in parts)


@dataclass
class Outcome:
    """What a section found.

    Args:
        rows (`dict[str, list[dict]]`): By dictionary or baseline, each with a `width`.
        text (`str`): Its table.
        details (`Any`): Everything, JSON-able.
        plot (`Callable`, *optional*): Draws to the path it is given.
        notes (`list[str]`, *optional*): What a reader has to know.
        facts (`dict`, *optional*): What goes for all rows, such as losses of the language model.
    """

    rows: Rows
    text: str
    details: Any
    plot: Callable[[Path], None] | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Report) -> "Outcome":
        """What a report says."""
        return cls(report.flat(), str(report), report.to_dict(), report.plot, report.notes)
