"""Writing a cache: each writer writes its own shards and a record of them, the last writer writes the index.

Writers need not know of each other: they may be processes of one launch, or launches on several machines which share a
file system or a bucket. What is complete is never removed.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..stream import ActivationStream
from .fingerprint import differing_fields
from .format import BITS, FORMAT_VERSION, INDEX, STORED_DTYPES, CacheIndex, Shard, decode, encode
from .storage import CacheStorage


logger = logging.getLogger(__name__)

_ROWS_COMPARED = 4096  # at once, in float64


@dataclass
class Moments:
    """Sums over the finite rows of a hookpoint, from which the error of the stored rows follows.

    Args:
        rows (`int`): number of rows.
        mean (`list[float]`): mean of the harvested rows, `[D]`.
        deviation (`float`): summed squared distance of the harvested rows from their mean.
        squared_error (`float`): summed squared distance of the stored rows from the harvested ones.
    """

    rows: int
    mean: list[float]
    deviation: float
    squared_error: float

    @classmethod
    def of(cls, harvested: Tensor, stored: Tensor) -> "Moments":
        """Return the sums over some rows, `[n, D]` each."""
        finite = harvested.isfinite().all(1)
        harvested, stored = harvested[finite].double(), stored[finite].double()
        mean = harvested.mean(0) if len(harvested) else harvested.new_zeros(harvested.shape[1])
        deviation, error = (harvested - mean).square().sum().item(), (stored - harvested).square().sum().item()
        return cls(len(harvested), mean.tolist(), deviation, error)

    def __add__(self, other: "Moments") -> "Moments":
        rows = self.rows + other.rows
        one, two = torch.tensor([self.mean, other.mean], dtype=torch.float64)
        share = other.rows / max(1, rows)
        between = (two - one).square().sum().item() * self.rows * share
        return Moments(
            rows,
            (one + (two - one) * share).tolist(),
            self.deviation + other.deviation + between,
            self.squared_error + other.squared_error,
        )

    @property
    def fvu(self) -> float:
        """Return the fraction of the variance that the stored rows miss."""
        return self.squared_error / self.deviation if self.deviation else 0.0


@torch.no_grad()
def build_cache(
    place: str | Path,
    stream: ActivationStream,
    tokens: int,
    fingerprint: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    dtype: str | None = None,
) -> None:
    """Write the next rows of a stream to a cache, as one of `world_size` writers.

    A writer whose part is complete does nothing; what an interrupted one left is replaced. The index is there when
    every writer has come to its end. Under `torch.distributed` all processes wait for each other.

    Args:
        place (`str` or `Path`): a folder, made if need be, or a URL that fsspec knows.
        stream ([`ActivationStream`]): rows, already shuffled within its buffer, half of which makes a shard.
        tokens (`int`): rows that this writer writes.
        fingerprint (`dict`): as [`cache_fingerprint`] gives it, equal for all writers.
        rank (`int`, *optional*, defaults to 0): number of this writer.
        world_size (`int`, *optional*, defaults to 1): number of writers.
        dtype (`str`, *optional*): `fp32`, `fp16`, `bf16` or `int8`; by default the stream's type.

    Raises:
        `ValueError`: there is a complete cache already, other writers write something else, the rows do not fit
            `dtype`, or the stream has none.
    """
    storage = CacheStorage(place)
    if storage.exists(INDEX):
        raise ValueError(f"'{place}' holds a complete activation cache. Use it, or delete it to build another.")
    name = f"{rank:05d}-of-{world_size:05d}"
    dtype = dtype or next(name for name, stored in STORED_DTYPES.items() if stored == stream.dtype)
    options = {"fingerprint": fingerprint, "tokens": tokens, "writers": world_size, "dtype": dtype}
    complete = _records(storage)
    for other in complete.values():
        _check_agreement(storage, options, other["asked"])
    if f"writer-{name}.json" not in complete:
        for unfinished in storage.names():
            if unfinished.startswith(f"shard-{name}-"):
                storage.delete(unfinished)
        contents = _write_shards(storage, f"shard-{name}", stream, tokens, dtype)
        record = {"format_version": FORMAT_VERSION, "asked": options, "left_out": stream.num_not_finite, **contents}
        storage.write(f"writer-{name}.json", json.dumps(record).encode())
        if stream.num_not_finite:
            logger.warning(
                "%d hidden states with NaN or infinite values were left out of the activation cache. A language model"
                " in float32 may have none.",
                stream.num_not_finite,
            )
    _barrier()
    if _is_first():
        _write_index(storage, world_size)
    _barrier()


def wait_for_cache() -> None:
    """Wait, in a process of the launch that writes nothing, until the others return from [`build_cache`]."""
    _barrier()
    _barrier()


def missing_writers(storage: CacheStorage) -> list[int]:
    """Return the numbers of the writers without a record; none where no writer has one."""
    records = _records(storage)
    writers = {record["asked"]["writers"] for record in records.values()}
    return [i for n in writers for i in range(n) if f"writer-{i:05d}-of-{n:05d}.json" not in records]


def _records(storage: CacheStorage) -> dict[str, dict[str, Any]]:
    names = [name for name in storage.names() if name.startswith("writer-") and name.endswith(".json")]
    return {name: json.loads(storage.read(name)) for name in names}


def _check_agreement(storage: CacheStorage, options: dict[str, Any], before: dict[str, Any]) -> None:
    same = options["fingerprint"] == before["fingerprint"]
    if same and any(options[field] != before[field] for field in ("writers", "tokens", "dtype")):
        missing, writers = ", ".join(map(str, missing_writers(storage))), before["writers"]
        raise ValueError(
            f"'{storage}' holds an activation cache that is not complete: of {writers} parts ({before['tokens']} rows "
            f"each, {before['dtype']}) part {missing} has not ended. End it, with --shard {missing} --of {writers} of "
            "the command that began it, or give another folder."
        )
    differing = differing_fields(options["fingerprint"], before["fingerprint"])
    if options["fingerprint"]["hookpoints"] != before["fingerprint"]["hookpoints"]:
        differing.append(f"hookpoints are {before['fingerprint']['hookpoints']} there")
    if differing:
        raise ValueError(
            f"'{storage}' holds parts of another activation cache: {'; '.join(dict.fromkeys(differing))}. Write to"
            " another folder, or delete this one."
        )


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _is_first() -> bool:
    """Return whether this is the first process of its launch."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _write_shards(
    storage: CacheStorage, prefix: str, stream: ActivationStream, tokens: int, dtype: str
) -> dict[str, Any]:
    """Write shards until there are `tokens` rows; return moments and shards, for the record."""
    rows_per_shard = max(stream.batch_size, stream.buffer_tokens // 2)
    shards: dict[str, Any] = {}
    moments: dict[str, Moments] = {}
    with tqdm(total=tokens, unit="token", unit_scale=True, desc="caching activations", disable=not _is_first()) as bar:
        for number, rows in enumerate(_gathered(stream, tokens, rows_per_shard, bar)):
            arrays = {}
            for hookpoint, values in rows.items():
                encoded = encode(hookpoint, values, dtype)
                arrays |= encoded
                here = _moments(hookpoint, values, encoded, dtype)
                moments[hookpoint] = moments[hookpoint] + here if hookpoint in moments else here
            data = safetensors.torch.save(arrays)
            name = f"{prefix}-{number:06d}.safetensors"
            storage.write(name, data)
            shards[name] = asdict(Shard(len(values), len(data), _offsets(data)))
    if not shards:
        raise ValueError("The stream gave no hidden states to cache.")
    return {"moments": {name: asdict(sums) for name, sums in moments.items()}, "shards": shards}


def _gathered(stream: ActivationStream, tokens: int, rows_per_shard: int, bar: tqdm) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of each shard, joined from batches."""
    parts: list[dict[str, Tensor]] = []
    held = 0
    for batch in stream:
        rows = {name: values[:tokens].cpu() for name, values in batch.items()}
        num_rows = len(rows[stream.hookpoints[0]])
        tokens, held = tokens - num_rows, held + num_rows
        parts.append(rows)
        bar.update(num_rows)
        if held >= rows_per_shard or tokens <= 0:
            yield _joined(parts)
            parts, held = [], 0
        if tokens <= 0:
            return
    if parts:
        yield _joined(parts)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _moments(hookpoint: str, rows: Tensor, encoded: dict[str, Tensor], dtype: str) -> Moments:
    """Return the moments of a shard's rows at one hookpoint, with the error of what a reader will decode."""
    raw = {name: values.numpy() for name, values in encoded.items() if name != hookpoint}
    raw[hookpoint] = encoded[hookpoint].view(BITS[STORED_DTYPES[dtype]]).numpy()
    moments = Moments(0, [0.0] * rows.shape[1], 0.0, 0.0)
    for start in range(0, len(rows), _ROWS_COMPARED):
        part = rows[start : start + _ROWS_COMPARED]
        stored = torch.empty(part.shape)
        bits = stored.view(torch.int32).numpy()
        decode(raw, hookpoint, start, start + len(part), dtype, bits, stored.dtype)
        moments += Moments.of(part, stored)
    return moments


def _offsets(data: bytes) -> dict[str, int]:
    """Return the first byte of each array of a safetensors file, by name."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {name: 8 + length + array["data_offsets"][0] for name, array in header.items() if name != "__metadata__"}


def _write_index(storage: CacheStorage, writers: int) -> None:
    """Join the records once all are there. Two writers may both be the last: they write the same."""
    records = _records(storage)
    if len(records) < writers or storage.exists(INDEX):
        return
    moments: dict[str, Moments] = {}
    shards: dict[str, Shard] = {}
    for _, record in sorted(records.items()):
        shards |= {name: Shard(**shard) for name, shard in record["shards"].items()}
        for hookpoint, fields in record["moments"].items():
            part = Moments(**fields)
            moments[hookpoint] = moments[hookpoint] + part if hookpoint in moments else part
    first = next(iter(records.values()))
    index = CacheIndex(
        fingerprint=first["asked"]["fingerprint"],
        dtype=first["asked"]["dtype"],
        rows=sum(shard.rows for shard in shards.values()),
        widths={hookpoint: len(sums.mean) for hookpoint, sums in moments.items()},
        errors={hookpoint: sums.fvu for hookpoint, sums in moments.items()},
        shards=shards,
    )
    storage.write(INDEX, index.to_json())
