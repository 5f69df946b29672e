"""What a repository or a folder holds, and loading it."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..convert.places import SAEPlace, saes_in
from ..models import SAEModel


@dataclass(frozen=True)
class SAEInfo:
    """An SAE of a repository, as its config describes it.

    Args:
        subfolder (`str`): Where it lies; `""` is the root.
        model_type (`str`), base_model (`str`, *optional*), hookpoint (`str`, *optional*): As in its config.
        d_in (`int`), num_latents (`int`): D and F.
        prefix_widths (`list[int]`): Widths at which its first latents are an SAE of their own.
    """

    subfolder: str
    model_type: str
    base_model: str | None
    hookpoint: str | None
    d_in: int
    num_latents: int
    prefix_widths: list[int]

    @classmethod
    def of(cls, subfolder: str, config: Mapping[str, Any]) -> "SAEInfo":
        """From an SAE's `config.json`, or its entry in the index at the root of a repository."""
        num_latents = config["num_latents"]
        widths = list(config.get("prefix_widths") or [num_latents])
        named = {key: config.get(key) for key in ("base_model", "hookpoint")}
        sizes = [config["d_in"], num_latents, *widths]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise TypeError(f"{subfolder!r} has sizes that are no whole numbers")
        if not all(isinstance(name, str | None) for name in (config["model_type"], *named.values())):
            raise TypeError(f"{subfolder!r} has names that are no text")
        return cls(
            subfolder,
            config["model_type"],
            **named,
            d_in=config["d_in"],
            num_latents=num_latents,
            prefix_widths=widths,
        )


def list_saes(
    repo_or_dir: str | Path, revision: str | None = None, token: str | bool | None = None
) -> dict[str, SAEInfo]:
    """The SAEs of a repository on the Hub or of a folder, without their weights.

    Args:
        repo_or_dir (`str` or `Path`): Repository id, or a folder such as that of a run.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): As in huggingface_hub.

    Returns:
        `dict[str, SAEInfo]`: By folder, which is what `subfolder=` takes; `""` is the root.

    Raises:
        `ValueError`: if there is none.
        `OSError`: if the repository cannot be read.
    """
    places = saes_in(repo_or_dir, revision=revision, token=token)
    configs = {place: sae.config for place, sae in places.items() if sae.config is not None}
    if not configs:
        raise ValueError(
            f"{repo_or_dir} holds no SAE of this package. `hf_matryoshka_sae.convert.load` reads those of other "
            "libraries."
        )
    try:
        return {place: SAEInfo.of(place, config) for place, config in configs.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The index or a config of {repo_or_dir} is damaged: {error!r}. Push it again.") from error


def load(repo_or_dir: str | Path, name: str | None = None, width: int | None = None, **kwargs) -> SAEModel:
    """One SAE of a repository or a folder.

    Args:
        repo_or_dir (`str` or `Path`): Repository id, or a folder such as that of a run.
        name (`str`, *optional*): Its folder or its hookpoint; not needed where there is one SAE.
        width (`int`, *optional*): Its first latents only.
        kwargs: As in `from_pretrained`: `revision`, `token`, `dtype`, ...

    Raises:
        `ValueError`: if there is none, or several, of that name; it lists those there are.
    """
    where = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    saes = list_saes(repo_or_dir, **where)
    # A folder's name means that folder, also where the hookpoint of others is called so.
    if name in saes:
        chosen = [saes[name]]
    else:
        chosen = [sae for sae in saes.values() if name is None or name == sae.hookpoint]
    if len(chosen) != 1:
        there = ", ".join(place or "(the root)" for place in saes)
        asked = f" under {name!r}" if name is not None else ""
        raise ValueError(f"{repo_or_dir} holds {len(chosen)} SAEs{asked}; name one of: {there}.")
    return _load(repo_or_dir, chosen[0], width, kwargs)


def load_many(repo_or_dir: str | Path, pattern: str = "*", width: int | None = None, **kwargs) -> dict[str, SAEModel]:
    """The SAEs of a repository or a folder whose place matches a pattern.

    Args:
        repo_or_dir (`str` or `Path`): Repository id, or a folder such as that of a run.
        pattern (`str`, *optional*, defaults to `"*"`): Of folders or hookpoints, such as `"*.layers.1[0-9]"`.
        width (`int`, *optional*): The first latents of each only.
        kwargs: As in `from_pretrained`: `revision`, `token`, `dtype`, ...

    Returns:
        `dict[str, SAEModel]`: In `eval` mode, by folder.

    Raises:
        `ValueError`: if none matches; it lists those there are.
    """
    where = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    chosen = matching(list_saes(repo_or_dir, **where), pattern, repo_or_dir)
    return {sae.subfolder: _load(repo_or_dir, sae, width, kwargs) for sae in chosen}


def matching(saes: Mapping[str, SAEInfo], pattern: str, source: str | Path) -> list[SAEInfo]:
    """Those whose folder or hookpoint matches a pattern; raises `ValueError` if none does."""
    chosen = [
        sae for place, sae in saes.items() if fnmatchcase(place, pattern) or fnmatchcase(sae.hookpoint or "", pattern)
    ]
    if not chosen:
        there = ", ".join(place or "(the root)" for place in saes)
        raise ValueError(f"No SAE of {source} matches {pattern!r}. It holds: {there}.")
    return chosen


def _load(repo_or_dir: str | Path, sae: SAEInfo, width: int | None, kwargs: dict[str, Any]) -> SAEModel:
    source = Path(repo_or_dir).expanduser() if Path(repo_or_dir).expanduser().is_dir() else repo_or_dir
    return SAEPlace(str(source), sae.subfolder, {"model_type": sae.model_type}).load(width, **kwargs)
