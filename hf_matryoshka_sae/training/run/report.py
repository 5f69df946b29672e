"""The closing report of a run: every dictionary on held-out text, as numbers, as text and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...common.files import write_json
from ...evaluation import Dictionary, HeldOut, evaluate_fidelity
from ...evaluation.report import ABOUT, plot, table
from ..data.harvest import HeldOutStates


def evaluate(data: HeldOut | HeldOutStates, saes: dict[str, Dictionary], show: bool = True) -> dict[str, Any]:
    """Reconstruction and recaptured language-model loss of the SAEs of one hookpoint.

    Args:
        data ([`HeldOut`] or [`HeldOutStates`]): The language model and held-out tokens, or held-out rows; every
            process evaluates its share.
        saes (`dict[str, Dictionary]`): By name; taking raw hidden states.
        show (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        `dict`: What [`evaluate_fidelity`] gives, with the rows under `saes`, and the `hookpoint`.

    Raises:
        `ValueError`: if there are no held-out tokens.
    """
    result = evaluate_fidelity(data, saes, show=show)
    rows = result.pop("subjects")
    return {"hookpoint": data.hookpoint, "selection": "mask", **result, "saes": rows}


def write_report(
    results: Sequence[dict[str, Any]], warnings: Sequence[str], folder: Path, accelerator: Accelerator
) -> None:
    """Save `results.json` and `results.png` in `folder` and print the table.

    Args:
        results (`Sequence[dict]`): What [`evaluate`] gave for each hookpoint.
        warnings (`Sequence[str]`): What is wrong with them; part of the file.
        folder (`Path`): The run's.
        accelerator (`Accelerator`): Prints in one process.
    """
    found = {"about": ABOUT, "selection": "mask", "warnings": list(warnings), "results": list(results)}
    write_json(folder / "results.json", found)
    plot(results, folder / "results.png")
    accelerator.print(table(results))
    accelerator.print(f"Saved {folder / 'results.json'} and {folder / 'results.png'}")
