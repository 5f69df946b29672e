"""Repositories on the Hub, as far as the page asks for them: what they hold, how large that is, and the files.

One request with a bound on all of it says whether the Hub answers, which commit is meant, and how large each file is:
nothing else has to be found out by waiting. That a Hub does not answer is remembered for a minute.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from ...models.pieces import is_weights
from ..limits import UNREACHABLE
from .lanes import Remembered


ANSWERS_WITHIN = 4.0  # seconds, with the look-up of its name
_REMEMBERED = 60.0
_SMALL = 5_000_000  # bytes of a file beside weights that is worth fetching
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz")
_MODEL = ("model.safetensors", "pytorch_model.bin")
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".yaml", ".yml")

Made = TypeVar("Made")


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Args:
        name (`str`): Its id.
        commit (`str`): Full hash.
        sizes (`dict[str, int]`): Bytes of its files by path.
        folder (`Path`, *optional*): Its copy on this machine, where the Hub does not answer.
    """

    name: str
    commit: str
    sizes: Mapping[str, int]
    folder: Path | None = None

    def fetch(self, files: Iterable[str]) -> Path:
        """Return the folder in the cache where some of its files are, downloaded if need be.

        Raises:
            `OSError`, `httpx.HTTPError`: if that fails.
        """
        if self.folder is not None:
            return self.folder
        folder = None
        for file in files:
            path = Path(hf_hub_download(self.name, file, revision=self.commit))
            folder = path.parents[len(PurePosixPath(file).parts) - 1]
        if folder is None:
            raise ValueError(f"'{self.name}' holds none of the files that are needed.")
        return folder

    def files_of_sae(self, place: str) -> list[str]:
        """Return the paths of what an SAE is loaded from: weights, and what describes them.

        Args:
            place (`str`): Folder, or file of weights; `""` is the root.
        """
        if place in self.sizes:
            weights = [place]
            place = PurePosixPath(place).parent.as_posix().removeprefix(".")
        else:
            weights = [file for file in self._in(place) if file.endswith(_WEIGHTS)]
            weights = [file for file in weights if is_weights(PurePosixPath(file).name)] or weights
        above = {"", *(parent.as_posix().removeprefix(".") for parent in PurePosixPath(place or ".").parents), place}
        beside = [file for folder in above for file in self._in(folder) if self._describes(file)]
        return [*weights, *sorted(beside)]

    def files_of_model(self, weights: bool = True) -> list[str]:
        """Return the paths of what a language model is loaded from, its `weights` among them."""
        here = self._in("")
        beside = [file for file in here if self._describes(file)]
        whole = [file for file in _MODEL if file in here or f"{file}.index.json" in here]
        ending = PurePosixPath(whole[0]).suffix if whole else ".safetensors"
        large = [file for file in here if file.endswith(ending) and (is_weights(file) or ending == ".bin")]
        return [*large, *beside] if weights else beside

    def bytes_of(self, files: Iterable[str]) -> int:
        """Return how large some of its files are in all."""
        return sum(self.sizes[file] for file in files)

    def _in(self, folder: str) -> list[str]:
        return [file for file in self.sizes if PurePosixPath(file).parent.as_posix().removeprefix(".") == folder]

    def _describes(self, file: str) -> bool:
        return file.endswith(_BESIDE) and self.sizes[file] <= _SMALL


class Hub:
    """Asks the Hub about repositories, and knows for a minute that it does not answer.

    Args:
        seconds (`float`, *optional*, defaults to 4.0): Within which it has to.
    """

    def __init__(self, seconds: float = ANSWERS_WITHIN) -> None:
        self.seconds = seconds
        self._silent = Remembered(_REMEMBERED)

    def repository(self, name: str, revision: str | None = None) -> Repository:
        """Return what a repository holds; where the Hub does not answer, what of it is in the cache.

        Raises:
            `ValueError`: if that is no name of one, there is none, it is not open to this page, or the Hub does not
                answer.
        """
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError("that is no name of a repository on the Hub (user/name).") from error
        if constants.HF_HUB_OFFLINE:
            return _cached(name, revision) or self._refuse("this machine is told to stay off the network")
        problem = self._silent.get()
        if problem is None:
            try:
                return within(self.seconds, lambda: self._asked(name, revision))
            except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
                raise ValueError(_no(error)) from error
            except FutureTimeoutError:
                problem = f"{constants.ENDPOINT} did not answer within {self.seconds:.0f} s"
            except HfHubHTTPError as error:
                if error.response.status_code < 500:
                    raise ValueError(f"{constants.ENDPOINT} refuses it: {_first_line(error)}") from error
                problem = f"{constants.ENDPOINT} is out of order ({error.response.status_code})"
            except UNREACHABLE:
                problem = f"{constants.ENDPOINT} cannot be reached"
            self._silent.set(problem)
        return _cached(name, revision) or self._refuse(problem)

    def _asked(self, name: str, revision: str | None) -> Repository:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=self.seconds)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or []}
        return Repository(name, info.sha or revision or "main", sizes)

    @staticmethod
    def _refuse(problem: str) -> Repository:
        raise ValueError(f"{problem}, and it is not on this machine. Try again in a minute.")


def within(seconds: float, ask: Callable[[], Made]) -> Made:
    """Return what a call returns, or raise what it raises, if it does so in time; else leave it to itself.

    Raises:
        `TimeoutError`: if it does not. What looks a name up cannot be interrupted, so it goes on in its thread.
    """
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(ask())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="asking the Hub").start()
    return done.result(seconds)


def _cached(name: str, revision: str | None) -> Repository | None:
    """What the cache holds of a repository, if anything."""
    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    snapshots = {path.name: path for path in storage.glob("snapshots/*")}
    commit = revision or max(snapshots, key=lambda name: snapshots[name].stat().st_mtime, default="")
    with contextlib.suppress(OSError):
        commit = (storage / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    if commit not in snapshots:
        return None
    folder = snapshots[commit]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Repository(name, commit, sizes, folder)


def _no(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "its owner asks visitors to accept conditions first, which this page cannot do."
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision."
    return "there is no such repository on the Hub, or it is private."


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
