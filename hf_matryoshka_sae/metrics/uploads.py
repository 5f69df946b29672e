"""Read uploads and pasted text of the metrics' pages as arrays and statistics; errors say what is wrong with them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


_LARGEST = 20_000_000
"""Largest number of numbers in an array; more would take minutes on their way through Arrow."""


def read_array(file: str | None, text: str | None, name: str) -> np.ndarray:
    """Read an array from an uploaded .npy or .csv file, or from pasted rows.

    Args:
        file (`str`, *optional*): Path of the upload; it takes precedence over the text.
        text (`str`, *optional*): Rows of numbers separated by commas, semicolons, tabs or spaces.
        name (`str`): Name of the array in messages.

    Raises:
        `ValueError`: if there is neither, or it holds no array of finite numbers.
    """
    if file is None and not (text or "").strip():
        raise ValueError(f"Upload or paste the {name}.")
    if file is not None and Path(file).suffix == ".npy":
        array = _read_npy(file, name)
    else:
        array = _read_rows(_text_of(file) if file is not None else text, name)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"The {name} must be numbers, got an array of {array.dtype}.")
    if array.size > _LARGEST:
        raise ValueError(
            f"The {name} hold {array.size:,} numbers, over {_LARGEST:,}. Upload sums over tokens instead."
        )
    return array.astype(np.float32)


def read_arrays(files: Sequence[str] | None, text: str | None, name: str) -> np.ndarray:
    """Read reconstructions `(P, N, D)` from one .npy file of that shape, or P files or pasted blocks `(N, D)`.

    Args:
        files (`Sequence[str]`, *optional*): Paths of the uploads, in the order of the widths.
        text (`str`, *optional*): Blocks of rows with blank lines between them.
        name (`str`): Name of the arrays in messages.

    Raises:
        `ValueError`: if there is no array, one holds no finite numbers, or shapes differ.
    """
    if files:
        arrays = [read_array(file, None, name) for file in files]
    else:
        blocks = [block for block in (text or "").replace("\r", "").split("\n\n") if block.strip()]
        arrays = [read_array(None, block, name) for block in blocks or [""]]
    if len(arrays) == 1 and arrays[0].ndim == 3:
        return arrays[0]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or arrays[0].ndim != 2:
        shapes_in_words = ", ".join(map(str, sorted(shapes)))
        raise ValueError(f"The {name} of each width must have the same shape (tokens, d_in), got {shapes_in_words}.")
    return np.stack(arrays)


def read_statistics(file: str | None, text: str | None) -> list[dict[str, Any]]:
    """Read sums over tokens, one mapping or a list of them, from an uploaded or pasted JSON.

    Args:
        file (`str`, *optional*): Path of the upload; it takes precedence over the text.
        text (`str`, *optional*): Pasted JSON.

    Raises:
        `ValueError`: if there are no sums.
    """
    if file is None and not (text or "").strip():
        raise ValueError("Upload or paste the JSON of the statistics.")
    try:
        content = json.loads(_text_of(file) if file is not None else text or "")
    except json.JSONDecodeError as error:
        raise ValueError(f"This is no JSON: {error}.") from error
    sums = content if isinstance(content, list) else [content]
    if not sums or not all(isinstance(entry, dict) for entry in sums):
        raise ValueError("The JSON must hold the result of ReconstructionSums.to_dict(), or a list of such results.")
    return sums


def read_numbers(text: str | None, name: str) -> list[float]:
    """Read numbers separated by commas or spaces.

    Args:
        text (`str`, *optional*): The numbers.
        name (`str`): Name of the numbers in messages.

    Raises:
        `ValueError`: if there is none, or something else.
    """
    try:
        numbers = [float(part) for part in (text or "").replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"`{name}` must be numbers separated by commas: {error}.") from error
    if not numbers:
        raise ValueError(f"Enter the {name}: numbers separated by commas.")
    return numbers


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{Path(file).name}' is not text. Expected .npy, .csv or .json.") from error


def _read_npy(file: str, name: str) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"'{Path(file).name}' holds no {name}: {error}") from error


def _read_rows(text: str, name: str) -> np.ndarray:
    lines = text.translate(str.maketrans(";\t", ",,")).strip().splitlines()
    separator = "," if "," in lines[0] else None
    try:
        return np.loadtxt(io.StringIO("\n".join(lines)), delimiter=separator, ndmin=2, dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"The {name} must be rows of numbers without a header: {error}") from error
