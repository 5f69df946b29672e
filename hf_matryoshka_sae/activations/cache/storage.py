"""The files of a cache in a folder, or in any place that fsspec knows (`s3://`, `hf://`, `memory://`, `http://`).

Files are written whole or not at all: here to a temporary name first; elsewhere a store shows a file when it is
complete.
"""

import os
import time
from pathlib import Path

import fsspec
from fsspec.core import url_to_fs


_TRIES = 3
_WAIT_SECONDS = 0.5


class CacheStorage:
    """The files of one cache, by name.

    Args:
        place (`str` or `Path`): a folder, or a URL.

    Attributes:
        folder (`Path` or `None`): where the files can be memory-mapped; `None` for a store elsewhere.

    Raises:
        `ValueError`: fsspec does not know such a URL, or lacks the package for it.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place).rstrip("/")
        if "://" not in self.place:
            self.folder, self._files, self._root = Path(place), fsspec.filesystem("file"), self.place
            return
        try:
            self._files, self._root = url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise ValueError(f"The activation cache '{self.place}' cannot be reached: {error}") from error
        self._root = self._root.rstrip("/")
        is_local = isinstance(self._files, fsspec.get_filesystem_class("file"))
        self.folder = Path(self._root) if is_local else None

    def __str__(self) -> str:
        return self.place

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def exists(self, name: str) -> bool:
        """Return whether there is a complete file of this name."""
        self._files.invalidate_cache()  # another machine may have written it
        return (
            self._files.isfile(self._path(name)) if self.folder is not None else self._files.exists(self._path(name))
        )

    def names(self) -> list[str]:
        """Return the names of all files, sorted; none where there is no such place."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, `None` where it is missing."""
        try:
            return self._files.info(self._path(name))["size"]
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return a file, or its bytes from `start` up to `stop`; three attempts are made.

        Raises:
            `OSError`: it cannot be read.
        """
        for left in reversed(range(_TRIES)):
            try:
                data = self._files.cat_file(self._path(name), start=start, end=stop)
                if stop is not None and len(data) != stop - (start or 0):
                    raise OSError(f"{len(data)} bytes came of {stop - (start or 0)}")
                return data
            except Exception as error:  # each store has errors of its own
                if not left or isinstance(error, FileNotFoundError):
                    raise OSError(f"'{self._path(name)}' cannot be read: {error}") from error
                time.sleep(_WAIT_SECONDS)
        raise AssertionError

    def write(self, name: str, data: bytes) -> None:
        """Write a file of these bytes, in place of one of that name."""
        if self.folder is None:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._path(name), data)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{name}.{os.getpid()}.tmp"
        temporary.write_bytes(data)
        temporary.replace(self.folder / name)

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._files.rm_file(self._path(name))
