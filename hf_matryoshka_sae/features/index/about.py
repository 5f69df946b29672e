"""Find the files of an index, and read and check `index.json`: one that lacks needed fields is refused at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..sizes import FOLDER
from .layout import CONTEXTS, FORMAT, LATENTS


def read_about(path: Path, source: Any) -> dict[str, Any]:
    """Read the description of an index.

    Args:
        path (`Path`): The file `index.json`.
        source: Folder or repository in which the index was looked for, for the message.

    Raises:
        `ValueError`: if there is no finished index, it is damaged, or of another format.
    """
    if not path.is_file():
        raise ValueError(
            f"{source} has no finished feature index. Build one with `build_index` or `matryoshka-sae index`."
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        format_name = about["done"] and about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Build or download the index again.") from error
    if format_name != FORMAT:
        raise ValueError(f"Expected a finished index of format {FORMAT!r} in {path}, got {about['format']!r}.")
    for name, fits in _FIELDS.items():
        if not fits(about.get(name)):
            raise ValueError(
                f"{path} is damaged: {name!r} is {'missing' if name not in about else repr(about[name])[:80]}. Build "
                "or download the index again."
            )
    return about


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(name)) for name in (LATENTS, CONTEXTS))


def _are_probabilities(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, (int, float)) and 0 <= one <= 1 for one in value)


# Fields that this package relies on, in this room and in the Space
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "num_latents": lambda value: _is_count(value) and value > 0,
    "tokens": _is_count,
    "context_length": lambda value: _is_count(value) and value > 0,
    "files": _is_sizes,
    "probabilities": _are_probabilities,
    "base_model": lambda value: isinstance(value, str),
    "hookpoint": lambda value: isinstance(value, str),
    "weights": lambda value: isinstance(value, str),
    "logits": lambda value: isinstance(value, str),
    "dataset": lambda value: value is None or isinstance(value, dict),
}


# Where the files are


def in_folder(folder: Path) -> Callable[[str], Path]:
    """Return a function from the name of a file to its path in a folder."""

    def locate(name: str) -> Path:
        return folder / name

    return locate


def on_hub(repo: str, subfolder: str, revision: str | None, token: str | None) -> Callable[[str], Path]:
    """Return a function that downloads a file of the index and returns its path."""
    place = "/".join(part for part in (subfolder.strip("/"), FOLDER) if part)

    def locate(name: str) -> Path:
        try:
            return Path(hf_hub_download(repo, f"{place}/{name}", revision=revision, token=token))
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"'{repo}' is no folder here, and its feature index cannot be fetched from the Hub: {error}"
            ) from error
        except EntryNotFoundError:
            return Path(place) / name  # whoever reads it reports it missing
        except OSError as error:  # no such repository or revision, no right to read it, no answer
            raise ValueError(
                f"'{repo}' is no folder here, and cannot be read from the Hub: {error} Check the name, the revision "
                "and the token."
            ) from error

    return locate


def checked(locate: Callable[[str], Path], source: Any) -> Callable[[str, int], Path]:
    """Return `locate` with a check of the file's size."""

    def check(name: str, size: int) -> Path:
        path = locate(name)
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(
                f"The feature index of {source} is damaged: {name} is missing or not {size} bytes long. Build or "
                "download it again."
            )
        return path

    return check
