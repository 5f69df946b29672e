"""The SAEs in a folder, file or repository, of any format: listed without their weights, loaded one by one."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
from transformers.utils import CONFIG_NAME, resolve_revision

from ..assets import embedded_sae_path
from ..common.data_source import EMBEDDED
from ..models import SAEConfig, SAEModel
from ..models.checkpoint_files import failures_named
from ..models.hub_failures import downloads_checked, requests_named
from ..models.pieces import is_weights
from ..models.places import COLLECTION_TYPE, MODEL_TYPES, sae_config, saes_below
from ..models.weight_checks import is_inner_folder
from .loading import load
from .source import LocalFiles, files_of_repository, find_weights, first_names, subfolder_of


@dataclass(frozen=True)
class SAEPlace:
    """A saved SAE that has been found and is not loaded.

    Args:
        source (`str`): Folder or file, repository id, or `"embedded"`.
        subfolder (`str`): Its folder, or file of weights, in the source; `""` is the source itself.
        config (`dict`, *optional*): Config of an SAE of this package, from its `config.json` or the index at the root
            of its repository; `None` for another library's.
        where (`dict`, *optional*): Options `revision` and `token` of a repository.
    """

    source: str
    subfolder: str = ""
    config: Mapping[str, Any] | None = None
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """Return its folder on this machine; `None` for a file among others, the Hub's, and the embedded one."""
        path = Path(self.source) / self.subfolder
        return path if self.source != EMBEDDED and path.is_dir() else None

    @property
    def hookpoint(self) -> str:
        """Return its hookpoint, or `""` where that is not known without loading it."""
        return (self.config or {}).get("hookpoint") or ""

    @property
    def name(self) -> str:
        """Return the SAE's name in its run, whose folders are `<name>/<hookpoint>/`; elsewhere that of its folder."""
        source = Path(self.source).resolve() if Path(self.source).exists() else PurePosixPath(self.source)
        path = source / self.subfolder
        if path.name == self.hookpoint.replace(":", "-"):
            path = path.parent
        return path.relative_to(source).as_posix() if source in path.parents else path.name

    def load_config(self) -> SAEConfig:
        """Return the config; of another library's, which has none, that of the SAE, which is loaded for it."""
        if self.config is None:
            return self.load().config
        path = self._own_folder
        where = {**self.where, "subfolder": self.subfolder} if path is None else {}
        return AutoConfig.from_pretrained(self.source if path is None else path, **where)

    @property
    def _own_folder(self) -> Path | None:
        return embedded_sae_path() if self.source == EMBEDDED else self.folder

    def load(self, width: int | None = None, **options: Any) -> SAEModel:
        """Return the SAE, in `eval` mode.

        Args:
            width (`int`, *optional*): Number of the first latents to keep; of this package's SAEs no others are read.
            **options: Options of `from_pretrained` (`dtype`, ...), for another library's SAE those of [`load`].

        Raises:
            `ValueError`: if it is damaged, or no SAE.
            `OSError`: if its files cannot be read.
        """
        options = {**self.where, **options} | ({} if width is None else {"width": width})
        if self.config is None:
            return load(self.source, subfolder=self.subfolder or None, **options)
        named, kind = self.subfolder or "the root", self.config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(
                f"{self.subfolder or 'The root'} of {self.source} is of the type {kind!r}, which is no SAE of this "
                f"version. Known: {', '.join(sorted(MODEL_TYPES))}."
            )
        path = self._own_folder
        source, subfolder = (self.source, self.subfolder) if path is None else (str(path), "")
        try:
            with failures_named(source, options):
                return AutoModel.from_pretrained(source, subfolder=subfolder, **options).eval()
        except OSError as error:
            if "valid JSON" not in str(error):
                raise
            raise ValueError(
                f"config.json of {named} of {self.source} is damaged: {error} Pass `force_download=True` to replace a "
                "damaged copy in the cache, or push it again."
            ) from error
        except ValueError as error:
            if "Unrecognized model" not in str(error):
                raise
            raise ValueError(
                f"The index of {self.source} names {named.replace('the', 'its')}, and there is no SAE there. Push it "
                "again."
            ) from error


def saes_in(
    source: str | Path,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, SAEPlace]:
    """Find the SAEs in a place, without their weights.

    Checkpoints of training, what a killed save left, and what a run moved aside are left out. Another library's are
    looked for, by the names of their files, where there is none of this package.

    Args:
        source (`str` or `Path`): Folder of an SAE or of several, such as a run's; a file of weights; a repository id;
            or `"embedded"` for the SAE that the package ships.
        subfolder (`str`, *optional*): Folder, or file of weights, in the source. A local one becomes the source.
        revision (`str`, *optional*): Branch, tag or commit of a repository.
        token (`str` or `bool`, *optional*): Token for a repository, as in huggingface_hub.

    Returns:
        `dict[str, SAEPlace]`: SAEs by their place in the source, sorted; `""` is the source itself.

    Raises:
        `ValueError`: if there is no SAE.
        `OSError`: if the Hub cannot be reached.
    """
    source, inside = str(source), "/".join(part for part in (subfolder or "").split("/") if part not in ("", "."))
    if source == EMBEDDED:
        return {"": SAEPlace(EMBEDDED, "", sae_config(embedded_sae_path()))}
    path = _here(source)
    if path is not None and (path := path / inside).is_file():
        return {"": SAEPlace(str(path))}
    if path is not None:
        source, where, configs = str(path), {}, _in_folder(path)
    else:
        check_repository_id(source)
        options = {"revision": revision, "token": token}
        where = {key: value for key, value in options.items() if value is not None}
        configs = _in_repository(source, inside, options)
    if not configs:
        raise ValueError(
            f"{source!r} holds no SAE{f' in {inside!r}' if inside else ''}: no config.json in or under it is that of "
            "an SAE, and no file there is one of weights as other libraries name them."
        )
    return {place: SAEPlace(source, place, config, where) for place, config in sorted(configs.items())}


def only_sae(saes: Mapping[str, SAEPlace], why: str = "") -> SAEPlace:
    """Return the only SAE, or raise `ValueError` where there are several; `why` says why one is needed."""
    if len(saes) > 1:
        source = next(iter(saes.values())).source
        raise ValueError(f"{source!r} holds {len(saes)} SAEs.{why} Name one of: {first_names(list(saes))}.")
    return next(iter(saes.values()))


def _here(source: str) -> Path | None:
    """Return the file or folder on this machine, if there is one."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, of nobody's home, or with a zero in it
        return None


def check_repository_id(source: str) -> None:
    """Raise `ValueError` if a name, which is none of a file or folder here, is none of a repository either."""
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder or file {source[:80]!r} here, and that is no name of a repository on the Hub "
            "(user/name)."
        ) from error


def _in_folder(folder: Path) -> dict[str, Any]:
    own = sae_config(folder) if folder.is_dir() else None
    if own is not None:
        return {"": own}
    below = saes_below(folder)
    return below or _of_others(LocalFiles(folder).paths(), "", lambda file: _read_config(folder / file))


def _in_repository(repo: str, inside: str, where: dict[str, Any]) -> dict[str, Any]:
    """Return the configs of a repository's SAEs by folder: from its index, else from all that lie beside weights."""
    with requests_named(partial(_no_list, repo), unusable=(json.JSONDecodeError,)):
        where = where | {"revision": resolve_revision(repo, where["revision"], token=where["token"])}
        own = _config(repo, f"{inside}/{CONFIG_NAME}".lstrip("/"), where)
        if own.get("model_type") in MODEL_TYPES:
            return {inside: own}
        if own.get("model_type") == COLLECTION_TYPE and not inside:
            saes = own.get("saes") or {}
            if not isinstance(saes, dict):
                raise ValueError(f"The index of {repo} is damaged: `saes` should be by folder. Push it again.")
            for place in saes:
                if not is_inner_folder(place):
                    raise ValueError(f"The index of {repo} is damaged: {place!r} is no place in it. Push it again.")
            return {place: config if isinstance(config, dict) else {} for place, config in saes.items()}
        paths = [path for path in files_of_repository(repo, **where).paths() if _is_in(path, inside)]
        folders = {_parent(path) for path in paths if is_weights(PurePosixPath(path).name)}
        configs = {place: _config(repo, f"{place}/{CONFIG_NAME}".lstrip("/"), where) for place in sorted(folders)}
        ours = {place: config for place, config in configs.items() if config.get("model_type") in MODEL_TYPES}
        return ours or _of_others(paths, inside, lambda file: configs.get(_parent(file), {}))


def _of_others(paths: list[str], inside: str, config_of: Callable[[str], dict[str, Any]]) -> dict[str, None]:
    """Return the places of other libraries' SAEs, by their files; what transformers has a class for is no SAE."""
    others = {
        _parent(path)
        for path in paths
        if PurePosixPath(path).name == CONFIG_NAME and config_of(path).get("model_type") in CONFIG_MAPPING
    }
    weights = find_weights([path for path in paths if _parent(path) not in others], inside)
    if len(weights) == 1 and _parent(weights[0]) == inside:
        return {inside: None}
    return dict.fromkeys(subfolder_of(path, weights) for path in weights)


def _is_in(path: str, inside: str) -> bool:
    return not inside or path == inside or path.startswith(f"{inside}/")


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _no_list(repo: str, reason: str) -> str:
    return (
        f"The SAEs of {repo} could not be listed: no answer of the Hub came through ({reason}). The same call again "
        "may get one."
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _config(repo: str, file: str, where: dict[str, Any]) -> dict[str, Any]:
    """Return a config of a repository, empty where it has none; a damaged copy in the cache is fetched anew."""
    for force in (False, True):
        try:
            with downloads_checked(repo, where):
                text = Path(hf_hub_download(repo, file, force_download=force, **where)).read_text(
                    encoding="utf-8", errors="replace"
                )
        except EntryNotFoundError:
            return {}
        try:
            config = json.loads(text)
            return config if isinstance(config, dict) else {}
        except (ValueError, RecursionError) as error:
            damage = error
    raise ValueError(f"{file} of {repo} is no JSON ({damage}): damaged. Push it again.") from damage
