"""The SAEs in a folder, and their folders in a repository.

A run's folder holds `<sae name>/<hookpoint>/`. A repository of one SAE per hookpoint holds `<hookpoint>/`; one of
several keeps the names. A folder that is an SAE itself becomes a repository whose root is the SAE.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class SAEFolder:
    """A saved SAE.

    Args:
        folder (`Path`): Folder with its `config.json`.
        name (`str`): Name of the SAE in its run.
        hookpoint (`str`): Hookpoint in its config; `""` where the config names none.
        subfolder (`str`): Folder in a repository; `""` is the root.
    """

    folder: Path
    name: str
    hookpoint: str
    subfolder: str


def find_saes(folder: str | Path, names: Sequence[str] | None = None) -> list[SAEFolder]:
    """Find the saved SAEs in or under a folder.

    Args:
        folder (`str` or `Path`): Folder of a run, of one SAE, or of several.
        names (`Sequence[str]`, *optional*): Patterns; only SAEs whose name or `<name>/<hookpoint>` matches one.

    Returns:
        `list[SAEFolder]`: The SAEs, sorted by folder.

    Raises:
        `ValueError`: if there is none.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is no folder. Give the folder of a run, or that of a saved SAE.")
    from ..convert.places import saes_in  # after what can be said without torch

    places = [place for place in saes_in(folder).values() if place.config is not None]
    saes = [SAEFolder(folder / place.subfolder, place.name, place.hookpoint, place.subfolder) for place in places]
    if saes and not saes[0].subfolder:
        return saes
    chosen = [sae for sae in saes if names is None or _matches(sae, names)]
    if not chosen:
        names_in_words = "" if names is None else f" named {' or '.join(names)}"
        contents = f" It holds {', '.join(sae.subfolder for sae in saes)}." if saes else " No run has ended there."
        raise ValueError(f"'{folder}' holds no SAE{names_in_words}.{contents}")
    if len({sae.name for sae in chosen}) == 1:  # one SAE per hookpoint: the name says nothing
        chosen = [replace(sae, subfolder=sae.folder.name) for sae in chosen]
    return chosen


def _matches(sae: SAEFolder, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(sae.name, each) or fnmatchcase(sae.subfolder, each) for each in patterns)
