"""Safetensors files written in place: a header first, then rows of tensors, by whoever has them.

The bytes are those of `safetensors.torch.save_file`. That needs every tensor whole, contiguous and on the CPU; here a
tensor may be a view, lie on another device, or be spread over processes that each write their own rows.
"""

import json
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


_CHUNK = 2**26  # bytes that are copied at once where a tensor is no plain run of memory
_ALIGNED = 8

# In the order in which safetensors puts tensors into a file.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor of a file, by name."""


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The types and shapes of tensors."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape."""
    return dtype.itemsize * torch.Size(shape).numel()


def _layout(specs: Specs, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """The header, where in the file each tensor begins, and how large the file is."""
    for name, (dtype, _) in specs.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is of type {dtype}, which a safetensors file cannot hold.")
    header: dict[str, dict] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(specs, key=lambda name: (_ORDER[specs[name][0]], name)):
        dtype, shape = specs[name]
        end = offset + num_bytes(dtype, shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    begin = 8 + len(text)
    places = {name: begin + header[name]["data_offsets"][0] for name in specs}
    return len(text).to_bytes(8, "little") + text, places, begin + offset


def allocate(path: str | os.PathLike, specs: Specs, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file's header and give it its size; the tensors are zero until [`write_rows`] writes them.

    Args:
        path (`str` or `os.PathLike`): The file; one that is there is replaced.
        specs (`Mapping`): Type and shape of each tensor, by name.
        metadata (`Mapping[str, str]`, *optional*): For the header.

    Raises:
        `ValueError`: for a type that safetensors does not have.
    """
    header, _, size = _layout(specs, metadata)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)


def write_rows(
    path: str | os.PathLike,
    specs: Specs,
    tensors: Mapping[str, Tensor],
    first_row: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write rows of tensors to their places in a file that [`allocate`] made, and bring them to the disk.

    Several processes may write different rows of one file at the same time. No more than 64 MB are copied at once.

    Args:
        path (`str` or `os.PathLike`), specs (`Mapping`), metadata (`Mapping`, *optional*): As for [`allocate`].
        tensors (`Mapping[str, Tensor]`): Rows by name; other names of `specs` are left alone.
        first_row (`int`, *optional*, defaults to 0): Which row of the file's tensors their first row is.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    _, places, _ = _layout(specs, metadata)
    with open(path, "r+b") as file:
        for name, tensor in tensors.items():
            dtype, shape = specs[name]
            assert tensor.dtype == dtype, name
            assert tuple(tensor.shape[1:]) == shape[1:], name
            rows = tensor.detach() if tensor.dim() else tensor.detach()[None]
            total = shape[0] if shape else 1
            assert first_row >= 0, first_row
            assert first_row + len(rows) <= total, (name, first_row, len(rows), total)
            if not rows.numel():
                continue
            row_bytes = num_bytes(dtype, shape) // total
            file.seek(places[name] + first_row * row_bytes)
            for chunk in rows.split(max(1, _CHUNK // row_bytes)):
                file.write(as_bytes(chunk))
        file.flush()
        os.fsync(file.fileno())


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file without a second copy of the tensors in memory, and bring it to the disk.

    Args:
        path (`str` or `os.PathLike`): The file.
        tensors (`Mapping[str, Tensor]`): By name; they may be views, share memory, or lie on any device.
        metadata (`Mapping[str, str]`, *optional*): For the header.

    Raises:
        `ValueError`: for a type that safetensors does not have.
        `OSError`: if the file cannot be written; it is then half-written.
    """
    specs = specs_of(tensors)
    allocate(Path(path), specs, metadata)
    write_rows(path, specs, tensors, metadata=metadata)


def as_bytes(rows: Tensor) -> memoryview:
    """The bytes of a tensor, row after row; copied only where they are not so in this machine's memory."""
    # As bytes: numpy has no bfloat16.
    return memoryview(rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def give_usual_permissions(path: Path) -> None:
    """Let those read a file whom the umask allows to; safetensors writes for its owner alone."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        path.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))
    finally:
        os.close(descriptor)
        probe.unlink()
