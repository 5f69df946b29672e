"""Text and JSON written whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary name, then rename; see [`as_json`]."""
    write_text(path, as_json(data, indent=2) + "\n")


def as_json(data: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: NaN and infinity, of which JSON knows nothing, are null.

    Args:
        data (`Any`): What `json.dumps` takes.
        indent (`int`, *optional*): Spaces of a level; by default all is one line.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
