"""Files written whole or not at all, and JSON that any reader takes."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary name, then rename; see [`as_json`]."""
    write_text(path, as_json(data, indent=2) + "\n")


def as_json(data: Any, indent: int | None = None) -> str:
    """Return JSON that any reader takes: NaN and infinity, of which JSON knows nothing, are null.

    Args:
        data (`Any`): Data that `json.dumps` takes.
        indent (`int`, *optional*): Spaces by which a level is indented; by default all is one line.
    """
    return json.dumps(_with_null(data), indent=indent, allow_nan=False)


def _with_null(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _with_null(value) for key, value in data.items()}
    return [_with_null(value) for value in data] if isinstance(data, list | tuple) else data


def write_text(path: Path, text: str) -> None:
    """Write text to a temporary name, then rename."""
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `path` when the block succeeds, and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
