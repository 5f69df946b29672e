"""Saved SAEs, from a folder or the Hub, by the place in a language model where they read."""

import json
import re
from pathlib import Path

from transformers import AutoModel

from ..activations.language_model import EMBEDDED
from ..assets import embedded_sae_path
from ..models import CONFIGS, SAEModel


_ASIDE = re.compile(r"\.|before-\d{8}-\d{6}")


def open_saes(source: str, subfolder: str | None = None) -> tuple[dict[str, SAEModel], Path | None]:
    """Load the SAEs of a folder or repository.

    Args:
        source (`str`): Folder of an SAE, folder that holds such folders, Hub id, or `"embedded"`.
        subfolder (`str`, *optional*): Of either.

    Returns:
        The SAEs by name, in `eval` mode, and the folder they are in (`None` for the Hub).

    Raises:
        `ValueError`: if there is none.
    """
    if source == EMBEDDED:
        return {EMBEDDED: _load(str(embedded_sae_path()))}, None
    if not Path(source).expanduser().is_dir():
        return {source.rsplit("/")[-1]: _load(source, subfolder)}, None
    folder = Path(source).expanduser() / (subfolder or "")
    found = [folder] if _is_sae(folder) else sorted(path.parent for path in folder.rglob("config.json"))
    found = [path for path in found if _is_sae(path) and not _is_aside(path.relative_to(folder))]
    if not found:
        raise ValueError(f"'{folder}' holds no SAE: no config.json in or under it is that of an SAE.")
    saes = {path: _load(str(path)) for path in found}
    return {_name(path, folder, sae): sae for path, sae in saes.items()}, folder


def _is_aside(place: Path) -> bool:
    """Whether it is what a killed save left, or of an earlier run that was moved aside."""
    return any(map(_ASIDE.match, place.parts))


def _is_sae(folder: Path) -> bool:
    try:
        known = {config.model_type for config in CONFIGS.values()}
        return json.loads((folder / "config.json").read_text())["model_type"] in known
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _load(source: str, subfolder: str | None = None) -> SAEModel:
    try:
        sae = AutoModel.from_pretrained(source, subfolder=subfolder or "")
    except OSError as error:
        raise ValueError(
            f"No SAE can be loaded from {source!r}: {error} It is no folder here; a repository on the Hub that "
            "holds several SAEs needs --subfolder."
        ) from error
    if not isinstance(sae, SAEModel):
        raise ValueError(f"{source!r} is a {type(sae).__name__}, not an SAE.")
    return sae.eval()


def _name(path: Path, folder: Path, sae: SAEModel) -> str:
    """A run's folders are `<name>/<hookpoint>`; the hookpoint is told elsewhere."""
    path, folder = path.resolve(), folder.resolve()
    if path.name == (sae.config.hookpoint or "").replace(":", "-"):
        path = path.parent
    return path.relative_to(folder).as_posix() if folder in path.parents else path.name


def by_place(
    saes: dict[str, SAEModel], model: str | None, hookpoint: str | None
) -> dict[tuple[str, str], dict[str, SAEModel]]:
    """The SAEs that read from the same place."""
    places: dict[tuple[str, str], dict[str, SAEModel]] = {}
    for name, sae in saes.items():
        place = {"model": model or sae.config.base_model, "hookpoint": hookpoint or sae.config.hookpoint}
        for flag, value in place.items():
            if value is None:
                raise ValueError(f"The config of `{name}` names no {flag}; pass --{flag}.")
        places.setdefault(tuple(place.values()), {})[name] = sae
    return dict(sorted(places.items()))
