"""What is there of a partly fetched weights file: `rows.json` beside it."""

import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class PartialRecord:
    """What is there of a file: `rows.json` and `weights.safetensors` in one folder."""

    def __init__(self, folder: Path, etag: str, size: int | None) -> None:
        self._path = folder / "rows.json"
        # Another name each time it is begun: who has the file of before open must not see this one's holes.
        self.weights = folder / f"weights-{secrets.token_hex(4)}.safetensors"
        self.etag, self.size = etag, size
        self.header: dict[str, dict] | None = None
        self.start, self.rows = 0, {}
        self._noted, self.noted_bytes = {}, 0
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            weights = folder / record["weights"]
            with open(weights, "rb") as file:
                text = file.read(record["start"])[8:]
            # A file whose header was damaged since cannot be read; its rows are fetched again with it.
            if weights.stat().st_size == record["size"] and json.loads(text) == record["header"]:
                self.size, self.weights = record["size"], weights
                self.begin(record["header"], record["start"])
                self.rows = {str(name): int(rows) for name, rows in record["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.header, self.rows = None, {}  # none yet, or a damaged one: start over

    def begin(self, header: dict, start: int) -> None:
        """Take over the header of the file, whose data begin at `start`. Raises `ValueError` for an absurd one."""
        if not isinstance(header, dict):
            raise ValueError(f"it holds a {type(header).__name__}")
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in tensors.items():
            _check_entry(name, entry, self.size - start)
        if not tensors:
            raise ValueError("no tensors")
        self._whole_header, self.header, self.start, self.rows = header, tensors, start, {}

    def drop(self) -> None:
        """Forget everything, the header too."""
        self._path.unlink(missing_ok=True)
        for path in self._path.parent.glob("weights-*.safetensors"):
            path.unlink(missing_ok=True)
        self.weights = self.weights.with_name(f"weights-{secrets.token_hex(4)}.safetensors")
        self.header, self.rows, self._noted = None, {}, {}

    def note(self, name: str, rows: int) -> None:
        """So many rows of a tensor were written, if not yet to the disk."""
        self.noted_bytes += max(0, rows - self.rows.get(name, 0)) * self.row_bytes(name)
        self._noted[name] = rows

    def count(self, file: Any) -> None:
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

    def latents(self, whole_tensors: set[str]) -> int:
        """How many latents are there."""
        return min((self.rows.get(name, 0) for name in self.header or () if name not in whole_tensors), default=0)

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
        state = {"weights": self.weights.name, "size": self.size, "start": self.start}
        state |= {"header": self._whole_header, "rows": self.rows}
        replace_text(self._path, json.dumps(state))


def _check_entry(name: str, entry: object, size: int) -> None:
    """Raises `ValueError` where a header's entry is of no tensor, or of none that has rows in `size` bytes of data."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {repr(entry)[:60]}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{what} of {name} is {repr(numbers)[:60]}")
    if len(offsets) != 2 or not offsets[0] < offsets[1] <= size:
        raise ValueError(f"data_offsets of {name} are {offsets} in {size} bytes")
    entries = math.prod(shape)
    if not entries or (offsets[1] - offsets[0]) % entries:
        raise ValueError(f"{name} of shape {shape} has {offsets[1] - offsets[0]} bytes")


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
