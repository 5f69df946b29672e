"""Where the SAEs of a run's folder or of a repository lie, for those who name it as a whole."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import CONFIG_NAME, resolve_revision

from .configuration_sae import CONFIGS
from .hub_failures import optional_file
from .partial_download import DROPPED


MODEL_TYPES = frozenset(config.model_type for config in CONFIGS.values())
COLLECTION_TYPE = "sae_collection"

# Half-finished saves, checkpoints of training, and earlier runs that were moved aside.
NO_SAE = re.compile(r"\.|checkpoint-|before-\d{8}-\d{6}")
_DEPTH = 2  # `<sae name>/<hookpoint>/` in a run's folder


def sae_config(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The `config.json` of the SAE that a folder is; `None` where it is none."""
    config = _config(Path(folder) / CONFIG_NAME)
    return config if config.get("model_type") in MODEL_TYPES else None


def is_collection(folder: str | os.PathLike) -> bool:
    """Whether the `config.json` of a folder is an index of the SAEs below it."""
    return _config(Path(folder) / CONFIG_NAME).get("model_type") == COLLECTION_TYPE


def _config(path: str | os.PathLike | None) -> dict[str, Any]:
    """A `config.json`; empty where there is none that can be read."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def saes_below(folder: str | os.PathLike, depth: int | None = None) -> dict[str, dict[str, Any]]:
    """The configs of the SAEs in the folders below one, by place, sorted.

    Args:
        folder (`str` or `os.PathLike`): Such as that of a run. Its checkpoints, what a killed save left behind, and
            what a run moved aside are left out.
        depth (`int`, *optional*): How many levels of folders are looked at; all where not given.
    """
    configs = {}
    for path, folders, _ in os.walk(folder):
        place = Path(path).relative_to(folder)
        folders[:] = [name for name in folders if not NO_SAE.match(name)]
        if depth is not None and len(place.parts) >= depth:
            folders.clear()
        config = sae_config(path) if place.parts else None
        if config is not None:
            configs[place.as_posix()] = config
    return dict(sorted(configs.items()))


def collection_index(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The `config.json` for the root of a folder or repository, by which `AutoModel` finds the SAEs in its folders.

    Args:
        configs (`dict[str, dict]`): Of the SAEs, by their places.
    """
    names = ("model_type", "base_model", "hookpoint", "d_in", "num_latents")
    saes = {place: {name: config.get(name) for name in names} for place, config in configs.items()}
    for place, config in configs.items():
        saes[place]["prefix_widths"] = list(config.get("prefix_widths") or [config["num_latents"]])
    return {"architectures": ["SAECollection"], "model_type": COLLECTION_TYPE, "saes": saes}


def only_place(source: str | os.PathLike, places: Iterable[str]) -> str:
    """The place of the only SAE; raises `ValueError` where there are none or several, which it lists."""
    places = sorted(places)
    if len(places) != 1:
        raise ValueError(
            f"{source} holds {len(places)} SAEs. Say which: `subfolder=` one of {', '.join(places) or 'none'}."
        )
    return places[0]


def place_of_sae(source: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where the SAE lies that is meant, where `source` and `subfolder` name what holds SAEs in its folders.

    Args:
        source (`str` or `os.PathLike`): Folder or repository id.
        kwargs (`dict`): What `from_pretrained` got.

    Returns:
        `dict`: `subfolder`, and `revision` where it was resolved; empty where there is nothing to be found out.

    Raises:
        `ValueError`: if there are several SAEs, or others than in the `subfolder` asked for; it lists them.
    """
    subfolder = (kwargs.get("subfolder") or "").strip("/")
    if Path(source).is_dir():
        folder, pinned = Path(source) / subfolder, {}
        if (folder / CONFIG_NAME).is_file() and not is_collection(folder):
            return {}
        below = saes_below(folder, _DEPTH) if folder.is_dir() else {}
        if len(below) == 1:
            return {"subfolder": f"{subfolder}/{next(iter(below))}".strip("/")}
        places = list(saes_below(source, _DEPTH))
    else:
        asked = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
        revision = resolve_revision(source, kwargs.get("revision"), **asked)
        pinned = {} if revision is None else {"revision": revision}
        config = optional_file(source, CONFIG_NAME, asked | pinned | {"subfolder": subfolder})
        if config is not None and _config(config).get("model_type") != COLLECTION_TYPE:
            return pinned
        places = _places_on_hub(source, asked | pinned)
    if not places:
        return pinned  # what is wrong is told where the files are read
    if subfolder:
        raise ValueError(
            f"{source} holds no SAE in its subfolder {subfolder!r}. Say which: `subfolder=` one of "
            f"{', '.join(sorted(places))}."
        )
    return pinned | {"subfolder": only_place(source, places)}


def _places_on_hub(repo: str | os.PathLike, where: dict[str, Any]) -> list[str]:
    """The folders of a repository that hold an SAE, by its index, else by the names of its files."""
    index = _config(optional_file(repo, CONFIG_NAME, where))
    if index.get("model_type") == COLLECTION_TYPE:
        return list(index.get("saes") or {})
    if where.get("local_files_only"):
        return []
    try:
        files = HfApi(token=where.get("token")).list_repo_files(str(repo), revision=where.get("revision"))
    except (OSError, ValueError, *DROPPED):  # what is wrong is told where the files are read
        return []
    return [file.removesuffix(f"/{CONFIG_NAME}") for file in files if file.endswith(f"/{CONFIG_NAME}")]
