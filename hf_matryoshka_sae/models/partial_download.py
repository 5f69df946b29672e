"""The first latents of a weights file on the Hub, fetched as byte ranges into a cached file that can grow.

Beside the Hub's `blobs` and `snapshots` a cached repository gets

    partial/refs/<commit>/<path>            the etag of that file
    partial/<etag>/weights-<n>.safetensors  of the whole file's layout; rows that were not fetched are holes
    partial/<etag>/rows.json                its name, its header, and how many rows of each tensor are there

Rows are written and flushed before `rows.json` counts them, and `rows.json` is replaced at once, so a process may die
anywhere. A lock lets several processes ask for the same file. When no row is missing, the file becomes an ordinary
blob of the cache.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    httpx,
    tqdm,
)

from .digests import digest, first_wrong_row
from .partial_record import PartialRecord, replace_text


_FIRST_READ = 8192  # bytes; the header of an SAE's file is under 1 KB
_LARGEST_HEADER = 2**20  # with room for a card's worth of metadata
_PIECE = 64 * 2**20  # bytes fetched between two updates of the record
_CHUNK = 2**20
_ATTEMPTS = 5  # at a connection that breaks in the middle; requests that fail are repeated by huggingface_hub
DROPPED = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
"""What is raised where a connection breaks."""


Digests = Callable[[bool], dict | None]
"""Gives the digests that were pushed with a file, see `digests.py`; with `True` fetches them anew."""


class RangesRefused(Exception):
    """The server does not send parts of files, or not what was asked for."""


class NotInCache(FileNotFoundError):
    """This is offline, and the cache does not have what is asked for."""


class PartialFile:
    """A weights file on the Hub of which the first rows are, or will be, in the cache.

    Args:
        repo_id (`str`), filename (`str`), commit (`str`): Which file.
        token (`str` or `bool`, *optional*), cache_dir (`str`, *optional*): As in `hf_hub_download`.
        offline (`bool`, *optional*, defaults to `False`): Use what is cached only.
    """

    def __init__(
        self,
        repo_id: str,
        filename: str,
        commit: str,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        offline: bool = False,
    ) -> None:
        self.repo_id, self.filename, self.commit, self.token = repo_id, filename, commit, token
        self.cache_dir = cache_dir or constants.HF_HUB_CACHE
        self.offline = offline or constants.HF_HUB_OFFLINE
        self.storage = Path(self.cache_dir) / repo_folder_name(repo_id=repo_id, repo_type="model")
        self.url = hf_hub_url(repo_id, filename, revision=commit)
        self.references = self.storage / "partial" / "refs"
        self._reference = self.references / commit / filename

    @property
    def begun(self) -> bool:
        """Whether some of it was fetched before."""
        return self._known_etag() is not None

    def _known_etag(self) -> str | None:
        try:
            return self._reference.read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def whole(self) -> Path | None:
        """The whole file, where it is in the cache."""
        path = try_to_load_from_cache(self.repo_id, self.filename, self.cache_dir, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def sibling_cached(self, name: str) -> bool:
        """Whether another file of the same folder is in the cache."""
        filename = (Path(self.filename).parent / name).as_posix()
        return isinstance(try_to_load_from_cache(self.repo_id, filename, self.cache_dir, revision=self.commit), str)

    def fetch(
        self,
        width: int | None,
        whole_tensors: set[str],
        published: Digests = lambda again: None,
        force: bool = False,
    ) -> Path:
        """A file of which at least the first `width` rows of every tensor are there.

        Args:
            width (`int`, *optional*): Rows; all where not given.
            whole_tensors (`set[str]`): Names of tensors without a latent axis.
            published (`Callable`, *optional*): Gives the digests that were pushed with the file.
            force (`bool`, *optional*, defaults to `False`): Fetch anew what is in the cache.

        Returns:
            `Path` of a safetensors file that may have holes past these rows.

        Raises:
            `RangesRefused`: if only the whole file can be had.
            `EntryNotFoundError`: if there is no such file; `NotInCache`: if this is offline.
            one of `DROPPED`: if the connection fails for good; what came until then is kept.
            `ValueError`: if what came is damaged.
        """
        etag, size = self._identify()
        folder, blob = self.storage / "partial" / etag, self.storage / "blobs" / etag
        if not force:
            record = PartialRecord(folder, etag, size)
            if record.header is not None and not any(record.missing(width, whole_tensors)) and not record.complete:
                return record.weights  # needs no lock, so that a cache that cannot be written to serves too
        # Past the folder, which goes when the file is complete.
        lock = Path(self.cache_dir) / ".locks" / self.storage.name / f"{etag}.partial.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not force:
                whole = self.whole()
                if whole is not None:  # another process has completed it meanwhile
                    return whole
                if blob.is_file():  # the same content under another name
                    return self._link(folder)
            folder.mkdir(parents=True, exist_ok=True)
            record = PartialRecord(folder, etag, size)
            if force or record.header is None:
                record.drop()
            try:
                complete = self._fetch_missing(record, width, whole_tensors, published)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise OSError(
                    errno.ENOSPC,
                    f"No space left on the device for {self.filename} of {self.repo_id}. What came is kept: the same "
                    "call goes on once there is room",
                ) from error
            if not complete:
                return record.weights
            _check_sum(record)
            blob.parent.mkdir(exist_ok=True)
            os.replace(record.weights, blob)
            return self._link(folder)

    def _link(self, folder: Path) -> Path:
        """Give a complete blob its place in the snapshot: nothing is downloaded."""
        whole = hf_hub_download(
            self.repo_id, self.filename, revision=self.commit, token=self.token, cache_dir=self.cache_dir
        )
        self._reference.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return Path(whole)

    def forget(self) -> None:
        """Drop what was fetched, so that the next fetch starts over."""
        etag = self._known_etag()
        self._reference.unlink(missing_ok=True)
        if etag is not None:
            shutil.rmtree(self.storage / "partial" / etag, ignore_errors=True)

    def _identify(self) -> tuple[str, int | None]:
        """The file's etag, and its size where the server was asked."""
        etag = self._known_etag()
        if etag is not None:
            return etag, None
        if self.offline:
            raise NotInCache(f"{self.filename} of {self.repo_id} is not in the cache, and this is offline.")
        metadata = get_hf_file_metadata(self.url, token=self.token, retry_on_errors=True)
        if metadata.etag is None or metadata.size is None:
            raise RangesRefused("the server gives no etag or size")
        self._reference.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._reference, metadata.etag)
        return metadata.etag, metadata.size

    def _fetch_missing(
        self, record: PartialRecord, width: int | None, whole_tensors: set[str], published: Digests
    ) -> bool:
        """Bring the file up to `width` rows; whether it then is complete."""
        if record.header is None:
            self._online("nothing")
            self._fetch_header(record, published)
        missing = list(record.missing(width, whole_tensors))
        if missing:
            self._online(f"{record.latents(whole_tensors)} latents")
        total = sum((want - have) * record.row_bytes(name) for name, have, want in missing)
        label = f"{self.filename} ({'all' if width is None else f'first {width}'} latents)"
        with (
            open(record.weights, "r+b") as file,
            tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=not missing) as bar,
        ):
            try:
                for name, have, want in missing:
                    step = max(1, _PIECE // record.row_bytes(name))
                    for first in range(have, want, step):
                        last = min(first + step, want)
                        self._fetch_range(record, file, *record.span(name, first, last), bar)
                        self._verify(record, name, first, last, published)
                        record.note(name, last)
                        if record.noted_bytes >= _PIECE:
                            record.count(file)
            finally:
                record.count(file)  # what came whole before anything went wrong
        return record.complete

    def _online(self, have: str) -> None:
        if self.offline:
            raise NotInCache(
                f"{self.filename} of {self.repo_id}: {have} of it in the cache, and this is offline. Load fewer "
                "latents, or once with a connection."
            )

    def _fetch_header(self, record: PartialRecord, published: Digests) -> None:
        if record.size is None:
            record.size = get_hf_file_metadata(self.url, token=self.token, retry_on_errors=True).size
        with open(record.weights, "w+b") as file:
            read = min(_FIRST_READ, record.size)
            self._fetch_range(record, file, 0, read)
            file.seek(0)
            length = 8 + int.from_bytes(file.read(8), "little")
            if length > min(record.size, _LARGEST_HEADER):
                raise ValueError(f"{self.filename} of {self.repo_id} is no safetensors file, or a damaged one.")
            if length > read:
                self._fetch_range(record, file, read, length)
            file.seek(0)
            text = file.read(length)
            file.truncate(record.size)  # what is past the header is a hole
        name = Path(self.filename).name
        if not _holds(published, lambda digests: digests.get("headers", {}).get(name) in (None, digest(text))):
            raise ValueError(
                f"The header of {self.filename} of {self.repo_id} is not what was pushed: damaged on the way. It was "
                "dropped; the same call fetches it again."
            )
        try:
            record.begin(json.loads(text[8:]), length)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The header of {self.filename} of {self.repo_id} is damaged: {error}") from error

    def _fetch_range(self, record: PartialRecord, file: Any, start: int, stop: int, bar: Any = None) -> None:
        """Write the bytes from `start` to `stop` to their place; goes on where a connection broke."""
        position, attempt = start, 0
        while position < stop:
            headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}
            headers["Range"] = f"bytes={position}-{stop - 1}"
            file.seek(position)
            with http_stream_backoff("GET", self.url, headers=headers) as response:
                _check_answer(response, record, position, stop)
                before, broke = position, None
                # Not raised through the `with`: it would repeat a request whose answer it has already handed out.
                try:
                    for chunk in response.iter_bytes(_CHUNK):
                        if position + len(chunk) > stop:
                            raise RangesRefused("more came than was asked for")
                        file.write(chunk)
                        position += len(chunk)
                        if bar is not None:
                            bar.update(len(chunk))
                except DROPPED as error:
                    broke = error
            file.flush()
            attempt = attempt + 1 if position == before else 0
            if attempt >= _ATTEMPTS:
                raise broke or OSError(f"The answers to requests for {self.filename} of {self.repo_id} are empty.")
            if broke is not None:
                time.sleep(2**attempt / 4)

    def _verify(self, record: PartialRecord, name: str, first: int, last: int, published: Digests) -> None:
        """Compare new rows of a tensor with the digests that were pushed with it."""

        def wrong(digests: dict) -> int | None:
            return first_wrong_row(digests, name, first, last, lambda a, b: record.read(name, a, b))

        if not _holds(published, lambda digests: wrong(digests) is None):
            record.note(name, min(wrong(published(False) or {}) or 0, first))
            raise ValueError(
                f"Rows of {name} in {self.filename} of {self.repo_id} are not what was pushed: damaged on the way. "
                "They were dropped; the same call fetches them again."
            )


def _holds(published: Digests, holds: Callable[[dict], bool]) -> bool:
    """Whether something agrees with the digests, where there are any. They too may have been damaged on the way."""
    for again in (False, True):
        digests = published(again)
        if digests is None or holds(digests):
            return True
    return False


def _check_answer(response: Any, record: PartialRecord, start: int, stop: int) -> None:
    """Whether a response is the part of the file that was asked for."""
    if response.status_code == 200 and (start, stop) == (0, record.size):
        return
    if response.status_code in (200, 416, 501):
        raise RangesRefused(f"the server answers {response.status_code} to a request for a part")
    hf_raise_for_status(response)
    given = response.headers.get("Content-Range", "")
    if response.status_code != 206 or given != f"bytes {start}-{stop - 1}/{record.size}":
        raise RangesRefused(f"asked for bytes {start}-{stop - 1} of {record.size}, got {given!r}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RangesRefused("parts come compressed")


def _check_sum(record: PartialRecord) -> None:
    """Compare a complete file with the Hub's own checksum, where that is one of the content."""
    if len(record.etag) != 64:  # a small file's etag is git's, not the sha256 of LFS
        return
    with open(record.weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != record.etag:
        record.drop()
        raise ValueError(
            f"The sha256 of {record.weights.name} is {digest}, the Hub's is {record.etag}: damaged on the way. It was "
            "dropped; the same call fetches it again."
        )


def warn_of_whole_file(filename: str, repo_id: str, reason: Exception) -> None:
    """Say that everything is downloaded, and why."""
    warnings.warn(
        f"The whole of {filename} of {repo_id} is downloaded, not its first latents alone: {reason}.", stacklevel=2
    )
