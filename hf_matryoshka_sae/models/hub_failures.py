"""Requests to the Hub that failed for good, and files that came damaged: what to say, and what to drop.

The libraries below raise many kinds of errors for the same thing: a connection that broke may come as an error of
httpx, a `RuntimeError` around it, or a file that "does not exist". Here they become one, that says how to go on.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import httpx
from transformers.utils import CONFIG_NAME, cached_file


_TRY_LATER = (408, 429)  # statuses that, like those from 500 on, do not say no


class RequestFailedError(OSError):
    """A request to the Hub failed for good, or what came is damaged; the message says how to go on."""


def hub_failed(error: BaseException) -> bool:
    """Whether an error comes from a request that got no proper answer, rather than one that said no."""
    return any(map(_is_failure, _chain(error)))


@contextmanager
def requests_named(say: Callable[[str], str], unusable: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Say what requests that fail in the block mean.

    Args:
        say (`Callable[[str], str]`): Gives the message, from the reason in a line.
        unusable (`tuple` of `type`, *optional*): Errors that mean no proper answer too.

    Raises:
        [`RequestFailedError`]: in place of whatever comes from a request that got no proper answer.
    """
    outside = sys.exc_info()[1]  # a caller may try again while it handles the first failure
    try:
        yield
    except RequestFailedError:
        raise
    except Exception as error:
        chain = list(_chain(error, contexts=True, outside=outside))
        if not (any(map(_is_failure, chain)) or isinstance(error, unusable)):
            raise
        raise RequestFailedError(say(_reason(error, chain))) from error


def _reason(error: Exception, chain: list[BaseException]) -> str:
    """An error and the one it came from, in a line."""
    root = next(filter(_is_failure, chain), chain[-1])
    lines = [str(each).strip().partition("\n")[0] or type(each).__name__ for each in (error, root)]
    return lines[0] if lines[1] in lines[0] else f"{lines[0]} {type(root).__name__}: {lines[1]}"


def optional_file(source: str | os.PathLike, name: str, where: dict) -> str | None:
    """A file of a folder or repository, `None` where it has none.

    Args:
        source (`str` or `os.PathLike`): Folder or repository id.
        name (`str`): The file.
        where (`dict`): As in `from_pretrained`: `subfolder`, `revision`, `token`, ...

    Raises:
        `OSError`: if the Hub could not be asked. transformers would say that there is no such file.
    """
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
    if path is not None or Path(source).is_dir():
        return path
    try:
        return cached_file(source, name, **where)  # makes no request where the cache knows that there is none
    except OSError as error:
        if hub_failed(error):
            raise
        return None


@contextmanager
def downloads_checked(source: str | os.PathLike, kwargs: dict) -> Iterator[None]:
    """Compare files that came from the Hub meanwhile with its checksums, and drop what is damaged.

    Args:
        source (`str` or `os.PathLike`): Repository id; for a folder nothing is done.
        kwargs (`dict`): What `from_pretrained` got. A `config` in it was read from the cache before: its file counts.

    Raises:
        [`RequestFailedError`]: if a file is damaged, whatever else went wrong for it.
    """
    if source is None or Path(source).is_dir():
        yield
        return
    cache = kwargs.get("cache_dir") or constants.HF_HUB_CACHE
    storage = Path(cache) / repo_folder_name(repo_id=str(source), repo_type="model")
    # A file that was fetched in part is checked when it is complete.
    known = {path.name for folder in ("blobs", "partial") for path in storage.glob(f"{folder}/*")}
    known -= _config_blob(source, kwargs)
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    damaged = [path for path in storage.glob("blobs/*") if path.name not in known and not _is_whole(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    if damaged:
        raise RequestFailedError(
            f"{len(damaged)} file(s) of {source} are not what the Hub's checksums say: damaged on the way. They were "
            "dropped; the same call again fetches them."
        ) from failure
    if failure is not None:
        raise failure


@contextmanager
def fetching(source: str | os.PathLike, kwargs: dict) -> Iterator[None]:
    """Say what failed requests mean for an SAE that is fetched, and drop files that came damaged.

    Args:
        source (`str` or `os.PathLike`), kwargs (`dict`): As for [`downloads_checked`].
    """

    def say(reason: str) -> str:
        return (
            f"The connection to the Hub broke while {source} was fetched ({reason}). What came is kept: the same "
            "call again goes on from there."
        )

    with requests_named(say), downloads_checked(source, kwargs):
        yield


def _config_blob(source: str | os.PathLike, kwargs: dict) -> set[str]:
    """The name of the blob from which `AutoModel` read the config that it passes on."""
    commit = getattr(kwargs.get("config"), "_commit_hash", None)
    if commit is None:
        return set()
    name = "/".join(filter(None, ((kwargs.get("subfolder") or "").strip("/"), CONFIG_NAME)))
    path = try_to_load_from_cache(str(source), name, kwargs.get("cache_dir"), revision=commit)
    return {Path(path).resolve().name} if isinstance(path, str) else set()


def _is_whole(blob: Path) -> bool:
    """Whether a file is what its name, the Hub's etag, says; `True` where that is no checksum."""
    name = blob.name
    if not blob.is_file() or len(name) not in (40, 64) or not set(name) <= set("0123456789abcdef"):
        return True
    with open(blob, "rb") as file:
        if len(name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == name
        if hashlib.file_digest(file, "sha1").hexdigest() == name:  # proxies of the Hub have such etags
            return True
        file.seek(0)
        return hashlib.sha1(b"blob %d\0" % blob.stat().st_size + file.read()).hexdigest() == name  # git's


def _chain(
    error: BaseException | None, contexts: bool = False, outside: BaseException | None = None
) -> Iterator[BaseException]:
    """An error, those that it was raised from, and with `contexts` those that were handled then, but for `outside`."""
    while error is not None and error is not outside:
        yield error
        context = error.__context__ if contexts and not error.__suppress_context__ else None
        error = error.__cause__ or context


def _is_failure(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError | httpx.HTTPStatusError):
        status = getattr(error.response, "status_code", None)
        return status is not None and (status >= 500 or status in _TRY_LATER)
    # The last is huggingface_hub's word for a body of another length than was announced.
    unusable = isinstance(error, OSError) and str(error).startswith("Consistency check failed")
    return unusable or isinstance(error, httpx.HTTPError | FileMetadataError)
