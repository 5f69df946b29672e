"""The first latents of a weights file on the Hub, fetched as byte ranges into a cached file that can grow.

Beside the Hub's `blobs` and `snapshots` a cached repository gets

    partial/refs/<commit>/<path>            the etag of that file
    partial/<etag>/weights.safetensors      of the whole file's layout; rows that were not fetched are holes
    partial/<etag>/rows.json                its header, and how many rows of each tensor are there

Rows are written and flushed before `rows.json` counts them, and `rows.json` is replaced at once, so a process may die
anywhere. A lock lets several processes ask for the same file. When no row is missing, the file becomes an ordinary
blob of the cache.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

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

from .digests import first_wrong_row


_FIRST_READ = 8192  # bytes; the header of an SAE's file is under 1 KB
_LARGEST_HEADER = 100 * 2**20  # safetensors' own limit
_PIECE = 64 * 2**20  # bytes fetched between two updates of the record
_CHUNK = 2**20
_ATTEMPTS = 5  # at a connection that breaks in the middle; requests that fail are repeated by huggingface_hub
DROPPED = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
"""What is raised where a connection breaks."""


class RangesRefused(Exception):
    """The server does not send parts of files, or not what was asked for."""


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
    ):
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
        return self._reference.is_file()

    def whole(self) -> Path | None:
        """The whole file, where it is in the cache."""
        found = try_to_load_from_cache(self.repo_id, self.filename, self.cache_dir, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def sibling_cached(self, name: str) -> bool:
        """Whether another file of the same folder is in the cache."""
        filename = (Path(self.filename).parent / name).as_posix()
        return isinstance(try_to_load_from_cache(self.repo_id, filename, self.cache_dir, revision=self.commit), str)

    def fetch(
        self, width: int | None, whole_tensors: set[str], published: Callable[[], dict | None] = lambda: None
    ) -> Path:
        """A file of which at least the first `width` rows of every tensor are there.

        Args:
            width (`int`, *optional*): Rows; all where not given.
            whole_tensors (`set[str]`): Names of tensors without a latent axis.
            published (`Callable`, *optional*): Gives the digests that were pushed with the file, see `digests.py`.

        Returns:
            `Path` of a safetensors file that may have holes past these rows.

        Raises:
            `RangesRefused`: if only the whole file can be had.
            `EntryNotFoundError`: if there is no such file; `FileNotFoundError`: if this is offline.
            one of `DROPPED`: if the connection fails for good; what came until then is kept.
            `ValueError`: if what came is damaged.
        """
        etag, size = self._identify()
        folder = self.storage / "partial" / etag
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / "lock"):
            whole = self.whole()
            if whole is not None:  # another process has completed it meanwhile
                return whole
            record = _Record(folder, etag, size)
            if not self._fetch_missing(record, width, whole_tensors, published):
                return record.weights
            _check_sum(record)
            blob = self.storage / "blobs" / etag
            blob.parent.mkdir(exist_ok=True)
            os.replace(record.weights, blob)
            # The blob is there: nothing is downloaded, it only gets its place in the snapshot.
            whole = hf_hub_download(
                self.repo_id, self.filename, revision=self.commit, token=self.token, cache_dir=self.cache_dir
            )
            self._reference.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            return Path(whole)

    def forget(self) -> None:
        """Drop what was fetched, so that the next fetch starts over."""
        if self.begun:
            folder = self.storage / "partial" / self._reference.read_text()
            self._reference.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _identify(self) -> tuple[str, int | None]:
        """The file's etag, and its size where the server was asked."""
        if self.begun:
            return self._reference.read_text(), None
        if self.offline:
            raise FileNotFoundError(f"{self.filename} of {self.repo_id} is not in the cache, and this is offline.")
        found = get_hf_file_metadata(self.url, token=self.token, retry_on_errors=True)
        if found.etag is None or found.size is None:
            raise RangesRefused("the server gives no etag or size")
        self._reference.parent.mkdir(parents=True, exist_ok=True)
        _replace(self._reference, found.etag)
        return found.etag, found.size

    def _fetch_missing(
        self, record: "_Record", width: int | None, whole_tensors: set[str], published: Callable[[], dict | None]
    ) -> bool:
        """Bring the file up to `width` rows; whether it then is complete."""
        if record.header is None:
            self._online(record, "nothing")
            self._fetch_header(record)
        missing = list(record.missing(width, whole_tensors))
        if missing:
            self._online(record, f"{min(record.rows.values(), default=0)} latents")
        digests = published() if missing else None
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
                        self._verify(record, name, first, last, digests)
                        record.note(name, last)
                        if record.noted_bytes >= _PIECE:
                            record.count(file)
            finally:
                record.count(file)  # what came whole before anything went wrong
        return record.complete

    def _online(self, record: "_Record", have: str) -> None:
        if self.offline:
            raise FileNotFoundError(
                f"{self.filename} of {self.repo_id}: {have} of it in the cache, and this is offline. Load fewer "
                "latents, or once with a connection."
            )

    def _fetch_header(self, record: "_Record") -> None:
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
            file.seek(8)
            text = file.read(length - 8)
            file.truncate(record.size)  # what is past the header is a hole
        try:
            record.begin(json.loads(text), length)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The header of {self.filename} of {self.repo_id} is damaged: {error}") from error

    def _fetch_range(self, record: "_Record", file, start: int, stop: int, bar=None) -> None:
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

    def _verify(self, record: "_Record", name: str, first: int, last: int, published: dict | None) -> None:
        """Compare new rows of a tensor with the digests that were pushed with it."""
        if published is None:
            return
        wrong = first_wrong_row(published, name, first, last, lambda a, b: record.read(name, a, b))
        if wrong is not None:
            record.note(name, min(wrong, first))
            raise ValueError(
                f"Rows of {name} in {self.filename} of {self.repo_id} are not what was pushed: damaged on the way. "
                "They were dropped; the same call fetches them again."
            )


class _Record:
    """What is there of a file: `rows.json` and `weights.safetensors` in one folder."""

    def __init__(self, folder: Path, etag: str, size: int | None):
        self.weights, self._path = folder / "weights.safetensors", folder / "rows.json"
        self.etag, self.size = etag, size
        self.header: dict[str, dict] | None = None
        self.start, self.rows = 0, {}
        self._noted, self.noted_bytes = {}, 0
        try:
            found = json.loads(self._path.read_text())
            if self.weights.stat().st_size == found["size"]:
                self.size, self.start, self.header, self.rows = (
                    found[key] for key in ("size", "start", "header", "rows")
                )
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or a damaged one: start over

    def begin(self, header: dict, start: int) -> None:
        """Take over the header of the file, whose data begin at `start`."""
        header.pop("__metadata__", None)
        for entry in header.values():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= self.size - start or (entry["shape"] and not entry["shape"][0]):
                raise ValueError(f"data_offsets {entry['data_offsets']}")
        self.header, self.start, self.rows = header, start, {}

    def note(self, name: str, rows: int) -> None:
        """So many rows of a tensor were written, if not yet to the disk."""
        self.noted_bytes += max(0, rows - self.rows.get(name, 0)) * self.row_bytes(name)
        self._noted[name] = rows

    def count(self, file) -> None:
        """Count the rows that were noted, once they are on the disk."""
        if self._noted:
            os.fsync(file.fileno())
            self.rows |= self._noted
            self._noted, self.noted_bytes = {}, 0
            self._write()

    def missing(self, width: int | None, whole_tensors: set[str]) -> Iterator[tuple[str, int, int]]:
        """The tensors that lack rows, in the file's order: name, rows there are, rows there should be."""
        for name in sorted(self.header, key=lambda name: self.header[name]["data_offsets"]):
            rows, have = self._num_rows(name), self.rows.get(name, 0)
            want = rows if width is None or name in whole_tensors else min(width, rows)
            if want > have:
                yield name, have, want

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return all(self.rows.get(name, 0) == self._num_rows(name) for name in self.header)

    def row_bytes(self, name: str) -> int:
        """Bytes of each row of a tensor."""
        first, last = self.header[name]["data_offsets"]
        return (last - first) // self._num_rows(name)

    def span(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Where in the file rows of a tensor begin and end."""
        begin, each = self.start + self.header[name]["data_offsets"][0], self.row_bytes(name)
        return begin + start * each, begin + stop * each

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of rows of a tensor."""
        begin, end = self.span(name, start, stop)
        with open(self.weights, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def _num_rows(self, name: str) -> int:
        return (self.header[name]["shape"] or [1])[0]

    def _write(self) -> None:
        state = {"size": self.size, "start": self.start, "header": self.header, "rows": self.rows}
        _replace(self._path, json.dumps(state))


def _check_answer(response, record: _Record, start: int, stop: int) -> None:
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


def _check_sum(record: _Record) -> None:
    """Compare a complete file with the Hub's own checksum, where that is one of the content."""
    if len(record.etag) != 64:  # a small file's etag is git's, not the sha256 of LFS
        return
    with open(record.weights, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != record.etag:
        record.rows = {}
        record._write()
        raise ValueError(
            f"The sha256 of {record.weights.name} is {found}, the Hub's is {record.etag}: damaged on the way. It was "
            "dropped; the same call fetches it again."
        )


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def warn_of_whole_file(filename: str, repo_id: str, reason: Exception) -> None:
    """Say that everything is downloaded, and why."""
    warnings.warn(
        f"The whole of {filename} of {repo_id} is downloaded, not its first latents alone: {reason}.", stacklevel=2
    )
