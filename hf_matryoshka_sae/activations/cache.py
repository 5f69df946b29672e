"""Activations on disk, harvested once and shared by several runs.

A folder holds shards `shard-<process>-<number>.safetensors`, each with one contiguous `[n, D]` array per hookpoint,
and `index.json`, written last: a folder without it is half-written. The index carries a fingerprint of everything the
hidden states depend on, and a cache made of anything else is refused. Shards are memory-mapped through the offsets in
their headers, so that a run reads only its rows, at the speed of the page cache.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .stream import ActivationStream, ShuffledStream, to_device
from .text import DatasetConfig
from .tokens import TokenStream


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_INDEX = "index.json"
_SAMPLED_VALUES = 4096  # of each weight: enough to notice any training, little enough for the largest model
_SAMPLED_BYTES = 2**16
_ROWS_PER_READ = 8192
# Safetensors' names, and the numpy type that has the same size (numpy has no bfloat16).
_DTYPES = {
    "F32": (torch.float32, np.float32),
    "F16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, np.uint16),
}


def cache_fingerprint(
    model: nn.Module,
    token_stream: TokenStream,
    dataset: DatasetConfig,
    hookpoints: Sequence[str],
    dtype: torch.dtype | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Everything that cached hidden states depend on, as JSON-able values.

    Args:
        model (`nn.Module`): the language model; its config and a sample of each weight are hashed.
        token_stream ([`TokenStream`]): its tokenizer is hashed, its options are listed.
        dataset ([`DatasetConfig`]): the text; the size and ends of a local file are hashed too.
        hookpoints (`list[str]`): what is cached.
        dtype (`torch.dtype`, *optional*): type of the rows; by default the model's.
        more: whatever else decides which rows are cached, such as `max_norm_factor`; JSON-able.

    Returns:
        `dict`: named fields, compared one by one when a cache is opened.
    """
    dtype = dtype or next(model.parameters()).dtype
    return {
        "format_version": FORMAT_VERSION,
        "model": _digest(type(model).__name__, _config(model), *_weights(model)),
        "tokenizer": _digest(*_tokenizer(token_stream.tokenizer)),
        "dataset": _text(dataset),
        "context_length": token_stream.context_length,
        "pack": token_stream.pack,
        "add_bos": token_stream.add_bos,
        "exclude": token_stream.exclude,
        "hookpoints": list(hookpoints),
        "dtype": str(dtype).removeprefix("torch."),
        **more,
    }


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _config(model: nn.Module) -> str:
    fields = model.config.to_dict()
    # Where a checkpoint was loaded from, and by which version, does not change its hidden states.
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True, default=str)


def _weights(model: nn.Module) -> Iterator[str | bytes]:
    for name, weight in model.state_dict().items():
        yield f"{name} {list(weight.shape)} {weight.dtype}"
        stride = max(1, weight.numel() // _SAMPLED_VALUES)
        yield weight.detach().flatten()[::stride].double().cpu().numpy().tobytes()


def _tokenizer(tokenizer) -> Iterator[str]:
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by whichever call came last.
        yield json.dumps({**backend, "truncation": None, "padding": None}, sort_keys=True)
    else:
        yield json.dumps(tokenizer.get_vocab(), sort_keys=True)
    yield json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    yield str(tokenizer.chat_template)


def _text(dataset: DatasetConfig) -> dict[str, Any]:
    fields = asdict(dataset)
    del fields["streaming"]  # how it is read does not change what is read
    return {**fields, "files": _digest(*_file_ends(Path(dataset.path)))}


def _file_ends(path: Path) -> Iterator[str | bytes]:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            yield f"{file.name} {file.stat().st_size}"
            with file.open("rb") as stream:
                yield stream.read(_SAMPLED_BYTES)
                stream.seek(-min(_SAMPLED_BYTES, file.stat().st_size), os.SEEK_END)
                yield stream.read()


def has_cache(folder: str | Path) -> bool:
    """Whether a folder holds a complete cache, of whatever."""
    return (Path(folder) / _INDEX).is_file()


def build_cache(
    folder: str | Path, stream: ActivationStream, tokens: int, fingerprint: dict[str, Any], rank: int = 0
) -> None:
    """Writes the next rows of a stream to a cache. Every process calls it and writes its own shards.

    Args:
        folder (`str` or `Path`): where to; made if need be. What a build that did not finish left there is removed.
        stream ([`ActivationStream`]): rows, already shuffled within its buffer. A shard is what one filling gives.
        tokens (`int`): rows this process writes.
        fingerprint (`dict`): as [`cache_fingerprint`] gives it, equal on all processes.
        rank (`int`, *optional*, defaults to `0`): this process; with several, `torch.distributed` must be initialised.

    Raises:
        `ValueError`: there is a complete cache already, or the stream has no row.
    """
    folder = Path(folder)
    if has_cache(folder):
        raise ValueError(f"'{folder}' holds a complete activation cache. Use it, or delete it to build another.")
    _barrier()  # all processes have looked before one writes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("shard-*"):
            left_over.unlink()
    _barrier()
    rows_per_shard = max(stream.batch_size, stream.buffer_tokens // 2)
    with tqdm(total=tokens, unit="token", unit_scale=True, desc="caching activations", disable=rank != 0) as bar:
        for number, rows in enumerate(_shards(stream, tokens, rows_per_shard)):
            _write_shard(folder / f"shard-{rank:04d}-{number:06d}.safetensors", rows)
            bar.update(len(next(iter(rows.values()))))
    _barrier()
    if rank == 0:
        _write_index(folder, fingerprint)
    _barrier()


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _shards(stream: ActivationStream, tokens: int, rows_per_shard: int) -> Iterator[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = []
    held = 0
    for batch in stream:
        rows = {name: values[:tokens].cpu() for name, values in batch.items()}
        num_rows = len(rows[stream.hookpoints[0]])
        tokens, held = tokens - num_rows, held + num_rows
        parts.append(rows)
        if held >= rows_per_shard or tokens <= 0:
            yield _joined(parts)
            parts, held = [], 0
        if tokens <= 0:
            return
    if parts:
        yield _joined(parts)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _write_shard(path: Path, rows: dict[str, Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(rows, temporary)
    temporary.replace(path)


def _write_index(folder: Path, fingerprint: dict[str, Any]) -> None:
    shards = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        arrays, _ = _header(path)
        shards[path.name] = {"rows": next(iter(arrays.values()))["shape"][0], "bytes": path.stat().st_size}
    if not shards:
        raise ValueError("The stream gave no hidden states to cache.")
    temporary = folder / f"{_INDEX}.tmp"
    temporary.write_text(json.dumps({"fingerprint": fingerprint, "shards": shards}, indent=2))
    temporary.replace(folder / _INDEX)


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """Descriptions of a safetensors file's arrays, and where its data begins."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        arrays = json.loads(file.read(length))
    arrays.pop("__metadata__", None)
    return arrays, 8 + length


def _mapped(path: Path) -> dict[str, tuple[np.ndarray, torch.dtype]]:
    arrays, start = _header(path)
    mapped = {}
    for name, array in arrays.items():
        dtype, raw = _DTYPES[array["dtype"]]
        offset = start + array["data_offsets"][0]
        mapped[name] = np.memmap(path, raw, "r", offset=offset, shape=tuple(array["shape"])), dtype
    return mapped


class CachedActivationStream(ShuffledStream):
    """Batches from a cache, endless, with the interface of [`ActivationStream`].

    Each epoch takes the shards in another order; rows are mixed in the shuffle buffer, as live ones are. Every process
    reads its own part of each shard.

    Args:
        folder (`str` or `Path`): the cache.
        fingerprint (`dict`): what this run would harvest, as [`cache_fingerprint`] gives it.
        hookpoints (`list[str]`): which of the cached hookpoints to read.
        batch_size (`int`): rows in a batch, in this process.
        buffer_tokens (`int`): rows the shuffle buffer holds, per hookpoint.
        device (`torch.device`, *optional*, defaults to `"cpu"`): where the rows go.
        dtype (`torch.dtype`, *optional*): their type; by default the cache's.
        seed (`int`, *optional*, defaults to `0`): seed of the order of rows and shards.
        rank, world_size (`int`, *optional*): this process and how many there are; may differ from those of the build.

    Attributes:
        tokens_seen (`int`): rows given out by this process.
        num_cached (`int`): rows in the cache, for all processes together.

    Raises:
        `ValueError`: the cache is half-written, damaged or was made with something else (the message names the
            fields), or the buffer is too small.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: dict[str, Any],
        hookpoints: Sequence[str],
        batch_size: int,
        buffer_tokens: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        rows_per_read = min(_ROWS_PER_READ, max(1, buffer_tokens - batch_size))
        # Other processes draw in another order, or their batches would be alike in where they come from.
        super().__init__(hookpoints, batch_size, buffer_tokens, rows_per_read, seed * world_size + rank)
        self._folder, self._shards = Path(folder), _open_index(Path(folder), fingerprint)
        self._device, self._dtype, self._seed, self._share = device, dtype, seed, (rank, world_size)
        self.num_cached = sum(shard["rows"] for shard in self._shards.values())
        if self.num_cached < world_size * batch_size:
            raise ValueError(
                f"The activation cache has {self.num_cached} rows, fewer than one batch of {batch_size} for each of"
                f" {world_size} processes. Build a larger one."
            )
        self._move_to(epoch=0, shard=0, row=0)

    def _move_to(self, epoch: int, shard: int, row: int) -> None:
        generator = torch.Generator().manual_seed(self._seed + epoch)  # equal on all processes
        names = [list(self._shards)[i] for i in torch.randperm(len(self._shards), generator=generator).tolist()]
        self._epoch, self._order = epoch, names
        self._open_shard(shard, row)

    def _open_shard(self, shard: int, row: int) -> None:
        name = self._order[shard]
        (rank, world_size), rows = self._share, self._shards[name]["rows"]
        self._shard, self._arrays = shard, _mapped(self._folder / name)
        self._end = (rank + 1) * rows // world_size
        self._row = max(row, rank * rows // world_size)

    def _read(self) -> dict[str, Tensor]:
        while self._row >= self._end:
            self._next_shard()
        stop = min(self._row + self._rows_per_read, self._end)
        rows = {name: self._slice(name, stop) for name in self.hookpoints}
        self._row = stop
        return rows

    def _slice(self, hookpoint: str, stop: int) -> Tensor:
        array, dtype = self._arrays[hookpoint]
        rows = torch.from_numpy(np.array(array[self._row : stop]))  # a copy: the map is read-only
        return to_device(rows.view(dtype), self._device, self._dtype)

    def _next_shard(self) -> None:
        if self._shard + 1 < len(self._order):
            self._open_shard(self._shard + 1, 0)
            return
        if self._epoch == 0:
            logger.warning("All %d cached rows have been read once; reading them again.", self.num_cached)
        self._move_to(self._epoch + 1, 0, 0)

    def _row_device(self) -> torch.device | str:
        return self._device

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: place in the cache, waiting rows, generator."""
        return super().state_dict() | {"epoch": self._epoch, "shard": self._shard, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, given the same cache and options."""
        super().load_state_dict(state)
        self._move_to(state["epoch"], state["shard"], state["row"])


def _open_index(folder: Path, fingerprint: dict[str, Any]) -> dict[str, dict[str, int]]:
    if not has_cache(folder):
        half = " It was not written to its end." if folder.is_dir() and any(folder.glob("shard-*")) else ""
        raise ValueError(f"'{folder}' holds no complete activation cache.{half} Build it anew.")
    index = json.loads((folder / _INDEX).read_text())
    wanted, found = json.loads(json.dumps(fingerprint)), index["fingerprint"]
    if set(wanted["hookpoints"]) <= set(found["hookpoints"]):  # a run may use some of what is there
        wanted["hookpoints"] = found["hookpoints"]
    differing = [name for name in dict.fromkeys([*wanted, *found]) if wanted.get(name) != found.get(name)]
    if differing:
        details = "; ".join(f"{name} is {found.get(name)} there, {wanted.get(name)} here" for name in differing)
        raise ValueError(
            f"The activation cache '{folder}' was made with something else: {details}. Give this run another folder,"
            " or delete the cache."
        )
    for name, shard in index["shards"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ValueError(f"The activation cache '{folder}' is damaged at '{name}'. Delete it and build it anew.")
    return index["shards"]
