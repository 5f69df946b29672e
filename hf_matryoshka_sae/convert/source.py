"""Where a checkpoint lies: in a folder, in a file of its own, or in a repository on the Hub; found by its weights."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from ..models.places import NO_SAE


# Names of files of weights in other libraries. Other files are tried only where there is none of these.
_WEIGHTS = re.compile(
    r"sae_weights\.safetensors|sae\.safetensors|params\.safetensors|params\.npz|ae\.pt|ae_\d+\.pt|sae\.pt|\d+\.pt"
    r"|layer\d+\.sae\.pt|final\.safetensors|model\.safetensors|model\.safetensors\.index\.json|latents\.index\.json|pytorch_model\.bin"
)
_OTHER_WEIGHTS = re.compile(r".*\.(pt|pth|safetensors|npz)")
# Other files beside SAEs: examples of nearly a gigabyte, statistics, states of training.
_NO_WEIGHTS = re.compile(
    r"(examples|sparsity|statistics|expected|activation_whitening|activations_store_state|optimizer.*)\.safetensors"
    r"|(trainer_state|optimizer.*|scheduler.*|rng_state.*|training_args)\.(pt|pth)"
    r"|(model|latents)-\d{5,}-of-\d{5,}\.safetensors"
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LISTED = 20


class LocalFiles:
    """The files under a folder.

    Args:
        root (`Path`): The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = root.resolve().as_posix()

    def paths(self) -> list[str]:
        """Return relative paths of all files, with forward slashes, sorted."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def fetch(self, path: str) -> Path | None:
        """Return the path of a file on this machine, `None` where there is none."""
        file = self.root / path
        return file if file.is_file() else None


class HubFiles:
    """The files of a repository on the Hub; each is downloaded when it is asked for.

    Args:
        repo_id (`str`): The repository.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): Token, as in huggingface_hub.
    """

    def __init__(self, repo_id: str, revision: str | None = None, token: str | bool | None = None) -> None:
        self.name = self.repo_id = repo_id
        self.revision, self.token = revision, token
        self._listed = HfApi(token=token).list_repo_files(repo_id, revision=revision)

    def paths(self) -> list[str]:
        """Return paths of all files in the repository."""
        return sorted(self._listed)

    def fetch(self, path: str) -> Path | None:
        """Return the file in the cache, downloaded if need be; `None` where the repository has none."""
        if path not in self._listed:
            return None
        try:
            return Path(hf_hub_download(self.repo_id, path, revision=self.revision, token=self.token))
        except (HfHubHTTPError, httpx.HTTPError, EntryNotFoundError, OSError) as error:
            raise ValueError(f"{path} of {self.repo_id} cannot be downloaded: {error}") from error


@dataclass(frozen=True)
class Place:
    """One SAE among files.

    Args:
        files ([`LocalFiles`] or [`HubFiles`]): Files of its folder or repository.
        weights (`str`): Path of its weights among them.
    """

    files: LocalFiles | HubFiles
    weights: str

    @property
    def name(self) -> str:
        """Return the whole path, which for some formats says layer, width and k."""
        return f"{self.files.name}/{self.weights}"

    @property
    def folder(self) -> str:
        """Return the path of the folder with the weights; `""` is the root."""
        folder = PurePosixPath(self.weights).parent.as_posix()
        return "" if folder == "." else folder

    def beside(self, name: str, up: int = 0) -> Path | None:
        """Return a file in the weights' folder, or `up` folders above it."""
        folder = PurePosixPath(self.weights).parent
        if up and len(folder.parts) < up:
            return self._above(name, up - len(folder.parts))
        for _ in range(up):
            folder = folder.parent
        return self.files.fetch((folder / name).as_posix())

    def _above(self, name: str, up: int) -> Path | None:
        """Return a file `up` folders above the folder that the user named."""
        if isinstance(self.files, HubFiles):
            return None
        folder = self.files.root.resolve()
        for _ in range(up):
            folder = folder.parent
        return folder / name if (folder / name).is_file() else None


def locate(
    path_or_repo: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Place:
    """Find the one SAE in a folder, file or repository.

    Args:
        path_or_repo (`str` or `Path`): A file of weights, a folder with one SAE in or under it, or a Hub repository.
        subfolder (`str`, *optional*): Folder, or file of weights, in the folder or repository.
        revision (`str`, *optional*): Branch, tag or commit of a repository.
        token (`str` or `bool`, *optional*): Token for a repository, as in huggingface_hub.

    Raises:
        `ValueError`: if the place does not exist, or holds no SAE or several.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_file():
        return Place(LocalFiles(path.parent), path.name)
    if path.is_dir():
        files: LocalFiles | HubFiles = LocalFiles(path)
    elif _REPOSITORY.fullmatch(str(path_or_repo)):
        files = files_of_repository(str(path_or_repo), revision, token)
    else:
        raise ValueError(f"'{path_or_repo}' is no file or folder here, and no id of a Hub repository (owner/name).")
    inside = PurePosixPath(subfolder or "").as_posix().strip("/")
    weights = find_weights(files.paths(), "" if inside == "." else inside)
    where = f"'{path_or_repo}'" + (f" under {subfolder!r}" if subfolder else "")
    if not weights:
        raise ValueError(f"{where} holds no SAE: none of its {_counted(files.paths())} is a file of weights.")
    if len(weights) > 1:
        places = [subfolder_of(path, weights) for path in weights]
        raise ValueError(f"{where} holds {len(weights)} SAEs; pass `subfolder` to say which: {first_names(places)}.")
    return Place(files, weights[0])


def find_weights(paths: Sequence[str], inside: str = "") -> list[str]:
    """Return the files of weights in a folder; where it has none itself, those below it.

    Args:
        paths (`Sequence[str]`): All files.
        inside (`str`, *optional*): The folder, or a file of weights.

    Returns:
        `list[str]`: One path per SAE; steps of a training run whose result is there do not count.
    """
    if inside in paths:
        return [inside]
    below = [path for path in paths if not inside or path.startswith(f"{inside}/")]
    below = [path for path in below if not _hidden(path[len(inside) :])]
    weights = [path for path in below if _WEIGHTS.fullmatch(PurePosixPath(path).name)]
    if not weights:
        weights = [path for path in below if _OTHER_WEIGHTS.fullmatch(PurePosixPath(path).name)]
        weights = [path for path in weights if not _NO_WEIGHTS.fullmatch(PurePosixPath(path).name)]
    direct = [path for path in weights if PurePosixPath(path).parent == PurePosixPath(inside)]
    weights = direct or weights
    return [path for path in weights if not _is_step(path, weights)]


def _hidden(path: str) -> bool:
    """Return whether a path is in a half-finished save, a checkpoint of training, or a run that was moved aside."""
    return any(map(NO_SAE.match, path.strip("/").split("/")[:-1]))


def _is_step(path: str, weights: Sequence[str]) -> bool:
    """Return whether `checkpoints/ae_<step>.pt` lies below the finished `ae.pt`."""
    folder = PurePosixPath(path).parent
    return folder.name == "checkpoints" and (folder.parent / "ae.pt").as_posix() in weights


def subfolder_of(path: str, weights: Sequence[str]) -> str:
    """Return the `subfolder` of one of several files of weights: its folder, or itself where the folder has others."""
    folder = PurePosixPath(path).parent
    is_alone = sum(PurePosixPath(other).parent == folder for other in weights) == 1
    return folder.as_posix() if is_alone and folder.name else path


def first_names(names: Sequence[str]) -> str:
    """Return names for a message: the first of them, and how many more there are."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _counted(paths: Sequence[str]) -> str:
    return f"{len(paths)} files" + (f" ({first_names(paths)})" if paths else "")


def files_of_repository(
    repo_id: str, revision: str | None = None, token: str | bool | None = None
) -> LocalFiles | HubFiles:
    """Return the files of a repository; without a connection, what the cache has of them.

    Raises:
        `ValueError`: if there is no such repository, or neither the Hub nor the cache can give its files.
    """
    try:
        return HubFiles(repo_id, revision, token)
    except GatedRepoError as error:
        raise ValueError(f"{repo_id} is gated: ask for access on its page, and pass `token` or log in.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"'{repo_id}' is no file or folder here, and the Hub has no such repository (or shows it only to those "
            "who pass a `token`)."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision {revision!r}.") from error
    except HFValidationError as error:
        raise ValueError(f"'{repo_id}' is no file or folder here, and no id of a Hub repository: {error}") from error
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return _cached(repo_id, revision, error)


def _cached(repo_id: str, revision: str | None, reason: Exception) -> LocalFiles:
    """Return what the cache has of a repository, where the Hub cannot be reached. Downloads nothing."""
    try:
        return LocalFiles(Path(snapshot_download(repo_id, revision=revision, local_files_only=True)))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise ValueError(
            f"'{repo_id}' is no file or folder here, the Hub cannot be reached ({reason}), and the cache has nothing "
            "of it."
        ) from reason
