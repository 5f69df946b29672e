"""The files of a cache of hidden states: how rows are stored, and what the index holds.

A cache is a set of shards, `shard-<writer>-of-<writers>-<number>.safetensors`, each with one contiguous `[n, D]` array
per hookpoint. Each writer leaves a record, `writer-<writer>-of-<writers>.json`, when its part is complete;
`index.json` joins the records, so that a cache without it is half-written.

Rows are stored as they are (`fp32`, `fp16`, `bf16`) or as `int8`. An int8 row is
`center + channel_scale * row_scale * q`: center and channel_scale are `[D]`, of the shard; row_scale is one number of
the row, and q lies in -127..127. With a scale per row alone, or one per row and group of channels, the few channels
that are a hundred times larger than the rest in many language models would set the step of all their neighbours.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .storage import CacheStorage


FORMAT_VERSION = 2
INDEX = "index.json"
STORED_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
# Integers of the same size: numpy has no bfloat16, and bits are all that is copied.
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int8}
_RAW = {torch.int32: np.int32, torch.int16: np.int16, torch.int8: np.int8}
_LARGEST = 127
_ROWS_OF_MEDIAN = 4096


@dataclass
class Shard:
    """A file of a cache.

    Args:
        rows (`int`): rows in each of its arrays.
        bytes (`int`): size of the file.
        offsets (`dict[str, int]`): first byte of each array in the file.
    """

    rows: int
    bytes: int
    offsets: dict[str, int]


@dataclass
class CacheIndex:
    """What a complete cache holds.

    Args:
        fingerprint (`dict`): as [`cache_fingerprint`] gives it.
        dtype (`str`): how rows are stored, one of `STORED_DTYPES`.
        rows (`int`): rows in all shards together.
        widths (`dict[str, int]`): D of each hookpoint.
        errors (`dict[str, float]`): FVU of the stored rows against the harvested ones, by hookpoint: summed squared
            error over summed squared distance from the mean.
        shards (`dict[str, Shard]`): by file name.
    """

    fingerprint: dict[str, Any]
    dtype: str
    rows: int
    widths: dict[str, int]
    errors: dict[str, float]
    shards: dict[str, Shard]

    @property
    def bytes(self) -> int:
        """Return the size of all shards together."""
        return sum(shard.bytes for shard in self.shards.values())

    def to_json(self) -> bytes:
        """Return the content of `index.json`."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1).encode()

    def damaged(self, storage: CacheStorage) -> str | None:
        """Return the first file that is missing or of another size than the index says, or `None`."""
        return next((name for name, shard in self.shards.items() if storage.size(name) != shard.bytes), None)


def has_cache(place: str | Path) -> bool:
    """Return whether a folder or URL holds a complete cache, of any hidden states."""
    return CacheStorage(place).exists(INDEX)


def read_index(storage: CacheStorage) -> CacheIndex:
    """Return the index of a complete cache.

    Raises:
        `ValueError`: the cache is half-written, or of another version of the format.
    """
    if not storage.exists(INDEX):
        is_partial = any(name.startswith(("shard-", "writer-")) for name in storage.names())
        cause = " It was not written to its end." if is_partial else ""
        raise ValueError(f"'{storage}' holds no complete activation cache.{cause} Build it anew.")
    fields = json.loads(storage.read(INDEX))
    version = fields.pop("format_version", 1)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"The activation cache '{storage}' has version {version} of the format; this package reads version"
            f" {FORMAT_VERSION}. Build it anew in another folder."
        )
    shards = {name: Shard(**shard) for name, shard in fields.pop("shards").items()}
    return CacheIndex(**fields, shards=shards)


def encode(hookpoint: str, rows: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return the arrays that hold a shard's rows at one hookpoint, by name.

    Args:
        hookpoint (`str`): prefix of their names.
        rows (`Tensor`): `[n, D]`, on the CPU.
        dtype (`str`): one of `STORED_DTYPES`.

    Raises:
        `ValueError`: a finite number would become infinite.
    """
    if dtype == "int8":
        return _quantized(hookpoint, rows.float())
    stored = rows.to(STORED_DTYPES[dtype])
    if (rows.isfinite() & ~stored.isfinite()).any():
        largest = rows.where(rows.isfinite(), 0.0).abs().max()
        raise ValueError(
            f"{dtype} cannot hold the hidden states of {hookpoint}: the largest number is {largest:.3g}."
            " Store the cache as bf16 or int8."
        )
    return {hookpoint: stored.contiguous()}


def _quantized(hookpoint: str, rows: Tensor) -> dict[str, Tensor]:
    finite = rows.isfinite().all(1)
    kept = rows[finite] if finite.any() else rows.new_zeros(1, rows.shape[1])
    # The median, and lengths of rows taken out: tokens a thousand times the others do not say what a channel needs.
    center = kept[:: -(-len(kept) // _ROWS_OF_MEDIAN)].median(0).values
    units = torch.nn.functional.normalize(kept - center)
    channel_scale = units.square().mean(0).sqrt()
    channel_scale = channel_scale.where(channel_scale > 0, 1.0)  # a channel that does not change is its center
    units = (rows - center) / channel_scale
    row_scale = units.abs().amax(1) / _LARGEST
    steps = (units / row_scale.where(row_scale > 0, 1.0)[:, None]).round()
    return {
        # The scale of a row that is not finite is not either, and so it comes back as NaN, for the trainer to see.
        hookpoint: steps.where(finite[:, None], 0.0).to(torch.int8),
        f"{hookpoint}.row_scale": row_scale,
        f"{hookpoint}.channel_scale": channel_scale,
        f"{hookpoint}.center": center,
    }


def layout(hookpoint: str, dtype: str, rows: int, width: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Return raw type and shape of the arrays that [`encode`] makes; the first axis is of rows where there are any."""
    raw = _RAW[BITS[STORED_DTYPES[dtype]]]
    arrays: dict[str, tuple[type, tuple[int, ...]]] = {hookpoint: (raw, (rows, width))}
    if dtype == "int8":
        arrays[f"{hookpoint}.row_scale"] = np.float32, (rows,)
        arrays |= {f"{hookpoint}.{name}": (np.float32, (width,)) for name in ("channel_scale", "center")}
    return arrays


def decode(
    arrays: dict[str, np.ndarray],
    hookpoint: str,
    first: int,
    end: int,
    stored: str,
    out: np.ndarray,
    dtype: torch.dtype,
) -> None:
    """Write n rows of a shard to `out`, in a run's type.

    Args:
        arrays (`dict[str, np.ndarray]`): the shard's arrays, as [`layout`] describes them.
        hookpoint (`str`): the hookpoint whose rows are read.
        first (`int`): number of the first row in the arrays.
        end (`int`): number of the row after the last, first + n.
        stored (`str`): how the rows are stored, one of `STORED_DTYPES`.
        out (`np.ndarray`): `[n, D]`, receives the bits of the result.
        dtype (`torch.dtype`): type of the result.
    """
    if STORED_DTYPES[stored] is dtype:
        out[:] = arrays[hookpoint][first:end]
        return
    # Few enough to stay in the processor's cache.
    values = torch.from_numpy(np.array(arrays[hookpoint][first:end])).view(STORED_DTYPES[stored])
    result = torch.from_numpy(out).view(dtype)
    if stored != "int8":
        result.copy_(values)
        return
    row_scale = torch.from_numpy(np.array(arrays[f"{hookpoint}.row_scale"][first:end]))
    channel_scale, center = (
        torch.from_numpy(np.array(arrays[f"{hookpoint}.{name}"])) for name in ("channel_scale", "center")
    )
    units = values.float().mul_(row_scale[:, None])
    if dtype == torch.float32:
        torch.addcmul(center, units, channel_scale, out=result)
    else:
        result.copy_(torch.addcmul(center, units, channel_scale))
