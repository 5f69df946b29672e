"""Saved SAEs of any format, from a folder, a file or the Hub, by language model and hookpoint; what a run knows.

Paths in a run's `run.yaml` may be relative to where it was started, which is not known later: they are looked for from
the current folder, then from the run's folder and those around it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..activations import DatasetConfig
from ..activations.language_model import EMBEDDED
from ..convert.places import SAEPlace, saes_in
from ..models import SAEModel


RUN_FILE = "run.yaml"
_ABOVE = 4  # folders around an SAE's that may be the run's, and around the run's that paths may be relative to


def open_saes(
    source: str, subfolder: str | None = None, model: str | None = None, hookpoint: str | None = None
) -> tuple[dict[tuple[str, str], dict[str, SAEModel]], Path | None]:
    """Load the SAEs of a folder, file or repository.

    Args:
        source (`str`): Folder of an SAE, folder that holds such folders, file of weights, Hub id, or `"embedded"`.
        subfolder (`str`, *optional*): Folder, or file of weights, in the source.
        model (`str`, *optional*): Language model of all SAEs; by default that of each one's config, or of the run in
            whose folder they lie where the config has its bare name.
        hookpoint (`str`, *optional*): Hookpoint of all SAEs; by default that of each one's config.

    Returns:
        SAEs in `eval` mode by name, by language model and hookpoint; and the folder they are in (`None` for the Hub).

    Raises:
        `ValueError`: if there is no SAE, one cannot be loaded, or the config of one lacks model or hookpoint.
    """
    try:
        places = saes_in(source, subfolder)
        saes = [(place, place.load()) for place in places.values()]
    except OSError as error:
        raise ValueError(f"No SAE can be loaded from {source!r}: {error}") from error
    folder = Path(source).expanduser() / (subfolder or "")
    run = run_of(folder if folder.exists() else None)
    groups: dict[tuple[str, str], list[tuple[SAEPlace, SAEModel]]] = {}
    for place, sae in saes:
        where = {
            "model": model or own_model(sae.config.base_model, run),
            "hookpoint": hookpoint or sae.config.hookpoint,
        }
        for flag, value in where.items():
            if value is None:
                raise ValueError(f"The config of `{place.name}` names no {flag}; pass --{flag}.")
        groups.setdefault(tuple(where.values()), []).append((place, sae))
    return {key: _named(group) for key, group in sorted(groups.items())}, folder if folder.is_dir() else None


def _named(group: list[tuple[SAEPlace, SAEModel]]) -> dict[str, SAEModel]:
    """Return SAEs by their names in a run; by their places where several are called the same."""
    names = [place.name for place, _ in group]
    return {place.subfolder if names.count(place.name) > 1 else place.name: sae for place, sae in group}


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
