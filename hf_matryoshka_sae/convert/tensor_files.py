"""Tensors from untrusted files: safetensors, numpy archives and pickles.

Sizes that a file states are checked before memory of that size is used: sizes in an archive's directory, shapes in
numpy headers, entries of a tensor against the storage that it is a view of. Nothing in a file is run.
"""

import errno
import io
import math
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn


# An archive may unfold to so many times its own bytes, and so many more. Weights hardly shrink when compressed, and no
# library compresses them.
_UNFOLDED, _UNFOLDED_MORE = 1.5, 2**26
_EXPANDED = 2**20  # bytes that a tensor may have beyond its storage, such as one threshold for all latents
_LARGEST_PICKLE = 2**20  # bytes, without storages; those of state dicts have some KB

# The imports of pickled plain tensors, numbers, texts, lists and dictionaries. With `weights_only` torch allows more,
# some of which allocate as much memory as the file says.
_PLAIN_GLOBALS = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
    "torch.storage UntypedStorage",
    "torch.serialization _get_layout",
    "_codecs encode",
    "__builtin__ set",
    *(f"torch {name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    *(f"torch {name}" for name in dir(torch) if name.endswith("Storage")),
}
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's older layout; four more follow, then the storages
_OLD_PICKLES = 5


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the other values of a safetensors file, a numpy archive or a pickle.

    Raises:
        `ValueError`: if it is damaged, states far larger sizes than it has, or is a pickle that only code could read.
        `OSError`: if it cannot be opened.
    """
    match file.suffix:
        case ".safetensors":
            return _read_safetensors(file), {}
        case ".npz":
            return _read_npz(file), {}
    return split_tensors(_read_pickle(file), file)


@contextmanager
def _readable(file: Path, kind: str) -> Iterator[None]:
    """Turn any error of another library's reader into `ValueError`: the file is damaged."""
    try:
        yield
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # an error of the machine, not of offsets in the content
            raise
        raise _damaged(file, kind, error) from error
    except Exception as error:
        raise _damaged(file, kind, error) from error


def _damaged(file: Path, kind: str, reason: Exception | str) -> ValueError:
    # For a pickle torch recommends another argument, which would run code in the file: that text is left out.
    text = str(reason).strip() or type(reason).__name__
    cause = type(reason).__name__ if "weights_only" in text else text.splitlines()[0][:200]
    return ValueError(f"{file} cannot be read as a {kind} ({cause}). It is damaged or half-written: get it again.")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with _readable(file, "safetensors file"), safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (no mapping)


def _read_npz(file: Path) -> dict[str, Tensor]:
    kind = "numpy archive of plain numbers"
    with _readable(file, kind), zipfile.ZipFile(file) as archive:
        unfolded = _unfolded(archive)
        damage = _wrong_headers(archive) if _fits(file, unfolded) else None
    _check_unfolded(file, unfolded)
    if damage is not None:
        raise _damaged(file, kind, damage)
    with _readable(file, kind), np.load(file, allow_pickle=False) as content:
        return {name: torch.from_numpy(np.ascontiguousarray(content[name])) for name in content.files}


def _wrong_headers(archive: zipfile.ZipFile) -> str | None:
    """Return what is wrong with the first array that is no array of numbers as large as its header says."""
    for info in archive.infolist():
        with archive.open(info) as entry:
            version = np.lib.format.read_magic(entry)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = readers[version](entry)
            size = info.file_size - entry.tell()
        if dtype.kind not in "fiub":
            return f"{info.filename} is of type {dtype}"
        if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != size:
            return f"{info.filename} says it has shape {shape}, and has {size} bytes"
    return None


def _unfolded(archive: zipfile.ZipFile) -> int:
    """Return the size of an archive's content by its directory, which is the most that can be read from it."""
    return sum(info.file_size for info in archive.infolist())


def _fits(file: Path, size: int) -> bool:
    return size <= _UNFOLDED * file.stat().st_size + _UNFOLDED_MORE


def _check_unfolded(file: Path, size: int) -> None:
    if not _fits(file, size):
        raise ValueError(
            f"{file} has {file.stat().st_size:,} bytes and would unfold to {size:,}: that is no file of weights, "
            "which hardly shrink when they are compressed. If it is one, save it again without compression."
        )


# Pickles


def _read_pickle(file: Path) -> dict:
    with _readable(file, "torch file"):
        is_archive = zipfile.is_zipfile(file)
    if is_archive:
        with _readable(file, "torch file"), zipfile.ZipFile(file) as archive:
            unfolded = _unfolded(archive)
            stream = _main_pickle(archive) if _fits(file, unfolded) else None
        _check_unfolded(file, unfolded)
        if stream is None:
            raise ValueError(
                f"{file} is an archive without a state dict, or one of code (TorchScript), which is not run here. "
                "Save its state dict with torch.save instead."
            )
        _check_pickles(file, stream, 1)
    else:
        with open(file, "rb") as content:
            stream = io.BytesIO(content.read(_LARGEST_PICKLE))
        _check_pickles(file, stream, _OLD_PICKLES)
    with _readable(file, "torch file"):
        content = torch.load(file, weights_only=True, map_location="cpu")
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a dictionary of tensors, holds a {type(content).__name__}.")
    return content


def _main_pickle(archive: zipfile.ZipFile) -> io.BytesIO | None:
    """Return the pickle with the structure of what was saved; `None` where there is none, or code beside it."""
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in names):
        return None
    info = archive.getinfo(pickles[0])
    if info.file_size > _LARGEST_PICKLE:
        raise ValueError(f"without its tensors it has {info.file_size:,} bytes, more than {_LARGEST_PICKLE:,}")
    return io.BytesIO(archive.read(info))


def _check_pickles(file: Path, stream: BinaryIO, number: int) -> None:
    """Go through pickles without building anything; raises `ValueError` for what is no plain state dict."""
    for place in range(number):
        try:
            imports, first = _globals_of(stream)
        except Exception as error:  # pickletools raises whatever its readers meet
            raise _damaged(file, "torch file", error) from error
        if imports:
            raise ValueError(
                f"{file} holds more than tensors and plain values: reading it would import {', '.join(imports)}, and "
                "that would run code from the file. Save its state dict instead, with torch.save in the library "
                "that wrote it, if you trust where it comes from."
            )
        if number > 1 and place == 0 and first != _MAGIC:
            raise _damaged(file, "torch file", "it does not begin as torch.save writes it")


def _globals_of(stream: BinaryIO) -> tuple[list[str], Any]:
    """Return what one pickle would import beside what plain values need, and the first value in it."""
    imports, first, texts = set(), None, ["?", "?"]
    for operation, value, _ in pickletools.genops(stream):
        if first is None and operation.name != "PROTO":
            first = value
        if operation.name in ("GLOBAL", "INST"):
            imports.add(value)
        elif operation.name == "STACK_GLOBAL":  # module and name are the two texts before it
            imports.add(" ".join(texts[-2:]))
        elif isinstance(value, str):
            texts = [texts[-1], value]
    return sorted(name.replace(" ", ".")[:100] for name in imports - _PLAIN_GLOBALS)[:5], first


def split_tensors(content: dict, file: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a dictionary's tensors and its other values, or raise `ValueError` for tensors larger than stored."""
    named: Iterable[tuple[str, Any]] = ((name, value) for name, value in content.items() if isinstance(name, str))
    tensors, values = {}, {}
    for name, value in named:
        if isinstance(value, Tensor):
            _check_stored(name, value, file)
            tensors[name] = value.detach()
        else:
            values[name] = value
    return tensors, values


def _check_stored(name: str, tensor: Tensor, file: Path | str) -> None:
    """Raise `ValueError` unless a tensor is plain, and no larger than what the file holds of it."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"{name} in {file} is no plain tensor. Save its values with torch.save as one.")
    stored, size = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.itemsize
    if size > max(stored, _EXPANDED):
        raise ValueError(
            f"{name} in {file} has shape {tuple(tensor.shape)}, {size:,} bytes, of which {stored:,} are stored: it "
            "repeats them. Save `tensor.contiguous()` instead."
        )
