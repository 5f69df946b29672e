"""Saved SAEs of any format, from a folder, a file or the Hub, by language model and hookpoint."""

from pathlib import Path

from ..convert.places import SAEPlace, saes_in
from ..models import SAEModel
from .run_folder import own_model, run_of


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
