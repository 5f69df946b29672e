"""Where things lie: the SAEs of a folder, and their places in a repository.

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
        folder (`Path`): With its `config.json`.
        name (`str`): The SAE's name in its run.
        hookpoint (`str`): Where it reads, as its config says; `""` where that says nothing.
        subfolder (`str`): Its place in a repository; `""` is the root.
    """

    folder: Path
    name: str
    hookpoint: str
    subfolder: str


def find_saes(folder: str | Path, names: Sequence[str] | None = None) -> list[SAEFolder]:
    """The SAEs in or under a folder.

    Args:
        folder (`str` or `Path`): Folder of a run, of one SAE, or of several.
        names (`Sequence[str]`, *optional*): Only those whose name or `<name>/<hookpoint>` matches one of these
            patterns.

    Returns:
        `list[SAEFolder]`, sorted by place.

    Raises:
        `ValueError`: if there is none.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is no folder. Give the folder of a run, or that of a saved SAE.")
    from ..convert.places import saes_in  # after what can be said without torch

    places = [place for place in saes_in(folder).values() if place.config is not None]
    found = [SAEFolder(folder / place.subfolder, place.name, place.hookpoint, place.subfolder) for place in places]
    if found and not found[0].subfolder:
        return found
    chosen = [sae for sae in found if names is None or _matches(sae, names)]
    if not chosen:
        wanted = "" if names is None else f" named {' or '.join(names)}"
        there = f" It holds {', '.join(sae.subfolder for sae in found)}." if found else " No run has ended there."
        raise ValueError(f"'{folder}' holds no SAE{wanted}.{there}")
    if len({sae.name for sae in chosen}) == 1:  # one SAE per hookpoint: the name says nothing
        chosen = [replace(sae, subfolder=sae.folder.name) for sae in chosen]
    return chosen


def _matches(sae: SAEFolder, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(sae.name, each) or fnmatchcase(sae.subfolder, each) for each in patterns)
