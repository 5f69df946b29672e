"""What a run's folder knows of itself: its language model and the text to evaluate on, from `run.yaml`.

Paths in it may be relative to where the run was started, which is not known later: they are looked for from the
current folder, then from the run's folder and those around it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..activations import DatasetConfig
from ..activations.language_model import EMBEDDED


RUN_FILE = "run.yaml"
_ABOVE = 4  # folders around an SAE's that may be the run's, and around the run's that paths may be relative to


@dataclass
class RunText:
    """What a run says of its model and text.

    Args:
        folder (`Path`): The run's.
        model (`str`): Its language model, as a path from here where it is a folder.
        dataset ([`DatasetConfig`], *optional*): Held-out text; `None` where the run names none.
        context_length (`int`): Tokens in a window.
        exclude (`str`): Positions that were left out.
    """

    folder: Path
    model: str
    dataset: DatasetConfig | None
    context_length: int
    exclude: str


def run_of(folder: Path | None) -> RunText | None:
    """Return what the run says in whose folder an SAE, or a folder of SAEs, lies; `None` where there is no run."""
    if folder is None:
        return None
    folder = folder.expanduser().absolute()
    for place in [folder, *folder.parents][: _ABOVE + 1]:
        if (place / RUN_FILE).is_file():
            return _read(place)
    return None


def _read(folder: Path) -> RunText | None:
    try:
        fields = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
        model = reachable(str(fields["model"]), folder)
        dataset = fields.get("eval_dataset")
        if dataset is None and fields["dataset"]["path"] == EMBEDDED:
            dataset = {"path": EMBEDDED, "split": "heldout"}
        text = None
        if dataset is not None:
            known = {key: value for key, value in dataset.items() if key in DatasetConfig.__dataclass_fields__}
            text = DatasetConfig(**known | {"path": reachable(str(dataset["path"]), folder)})
        return RunText(folder, model, text, int(fields["context_length"]), str(fields["exclude"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        return None  # of another version, or not a run's at all: what is needed can be said on the command line


def reachable(path: str, folder: Path) -> str:
    """Return a path from here, where it is one that exists from here, from a folder or from those around it."""
    place = Path(path).expanduser()
    if place.is_absolute() or place.exists():
        return path
    for start in [folder, *folder.parents][: _ABOVE + 1]:
        if (start / place).exists():
            return str((start / place).resolve())
    return path


def own_model(model: str | None, run: RunText | None) -> str | None:
    """Return the language model an SAE names, or its run's where it names that by its last part alone."""
    if run is None or (model is not None and (model == EMBEDDED or Path(model).expanduser().exists())):
        return model
    same: Any = model is None or Path(model).name == Path(run.model).name
    return run.model if same else model
