"""List and load the SAEs of a repository or a folder."""

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
        subfolder (`str`): Folder in the repository; `""` is the root.
        model_type (`str`): Family, such as `"matryoshka_sae"`.
        base_model (`str`, *optional*): Name of the language model.
        hookpoint (`str`, *optional*): Module of the language model whose hidden states it reads.
        d_in (`int`): Width D of the hidden states.
        num_latents (`int`): Number F of latents.
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
        """Read an SAE's `config.json`, or its entry in the index at the root of a repository."""
        num_latents = config["num_latents"]
        widths = list(config.get("prefix_widths") or [num_latents])
        names = {key: config.get(key) for key in ("base_model", "hookpoint")}
        sizes = [config["d_in"], num_latents, *widths]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise TypeError(f"{subfolder!r} has sizes that are no whole numbers")
        if not all(isinstance(name, str | None) for name in (config["model_type"], *names.values())):
            raise TypeError(f"{subfolder!r} has names that are no text")
        return cls(
            subfolder,
            config["model_type"],
            **names,
            d_in=config["d_in"],
            num_latents=num_latents,
            prefix_widths=widths,
        )


def list_saes(
    repo_or_dir: str | Path, revision: str | None = None, token: str | bool | None = None
) -> dict[str, SAEInfo]:
    """List the SAEs of a repository on the Hub or of a folder, without reading their weights.

    Args:
        repo_or_dir (`str` or `Path`): Repository id, or a folder such as that of a run.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): Token of the Hub; by default the one huggingface_hub knows.

    Returns:
        `dict[str, SAEInfo]`: The SAEs by folder, which is what `subfolder=` takes; `""` is the root.

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


def load(repo_or_dir: str | Path, name: str | None = None, width: int | None = None, **kwargs: Any) -> SAEModel:
    """Load one SAE of a repository or a folder.

    Args:
        repo_or_dir (`str` or `Path`): Repository id, or a folder such as that of a run.
        name (`str`, *optional*): Folder or hookpoint of the SAE; not needed where there is only one.
        width (`int`, *optional*): Number of first latents to load; all by default.
        kwargs: Arguments of `from_pretrained`: `revision`, `token`, `dtype`, ...

    Raises:
        `ValueError`: if no SAE or several have that name; the message lists the SAEs there are.
    """
    where = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    saes = list_saes(repo_or_dir, **where)
    # The name of a folder means that folder, even where it is also the hookpoint of other SAEs.
    by_hookpoint = [sae for sae in saes.values() if name is None or name == sae.hookpoint]
    chosen = [saes[name]] if name in saes else by_hookpoint
    if len(chosen) != 1:
        places = ", ".join(place or "(the root)" for place in saes)
        under_name = f" under {name!r}" if name is not None else ""
        raise ValueError(f"{repo_or_dir} holds {len(chosen)} SAEs{under_name}; name one of: {places}.")
    return _load(repo_or_dir, chosen[0], width, kwargs)


def load_many(
    repo_or_dir: str | Path, pattern: str = "*", width: int | None = None, **kwargs: Any
) -> dict[str, SAEModel]:
    """Load the SAEs of a repository or a folder whose folder or hookpoint matches a pattern.

    Args:
        repo_or_dir (`str` or `Path`): Repository id, or a folder such as that of a run.
        pattern (`str`, *optional*, defaults to `"*"`): Pattern of folders or hookpoints, such as `"*.layers.1[0-9]"`.
        width (`int`, *optional*): Number of first latents of each to load; all by default.
        kwargs: Arguments of `from_pretrained`: `revision`, `token`, `dtype`, ...

    Returns:
        `dict[str, SAEModel]`: The SAEs by folder, in `eval` mode.

    Raises:
        `ValueError`: if none matches; the message lists the SAEs there are.
    """
    where = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    chosen = matching(list_saes(repo_or_dir, **where), pattern, repo_or_dir)
    return {sae.subfolder: _load(repo_or_dir, sae, width, kwargs) for sae in chosen}


def matching(saes: Mapping[str, SAEInfo], pattern: str, source: str | Path) -> list[SAEInfo]:
    """Return the SAEs whose folder or hookpoint matches a pattern; raise `ValueError` if none does."""
    chosen = [
        sae for place, sae in saes.items() if fnmatchcase(place, pattern) or fnmatchcase(sae.hookpoint or "", pattern)
    ]
    if not chosen:
        places = ", ".join(place or "(the root)" for place in saes)
        raise ValueError(f"No SAE of {source} matches {pattern!r}. It holds: {places}.")
    return chosen


def _load(repo_or_dir: str | Path, sae: SAEInfo, width: int | None, kwargs: dict[str, Any]) -> SAEModel:
    source = Path(repo_or_dir).expanduser() if Path(repo_or_dir).expanduser().is_dir() else repo_or_dir
    return SAEPlace(str(source), sae.subfolder, {"model_type": sae.model_type}).load(width, **kwargs)
