"""What is checked of weights that anybody may have written: headers before anything is made of them, numbers after.

A file says in its header which tensors it holds, of which types and shapes. Where that is not what the config says,
nothing is allocated. Names of files come from an index that anybody may have written too: they stay in its folder.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .configuration_sae import SAEConfig
from .pieces import WHOLE_TENSORS, read_index_json


_FLOATS = ("F32", "BF16", "F16", "F64")
_WHOLE_NUMBERS = ("I64", "I32")
_ENTRIES_AT_ONCE = 2**24


@dataclass(frozen=True)
class WeightFile:
    """A file on this machine with latents of an SAE.

    Args:
        path (`str` or `Path`): The file.
        names (`list[str]`, *optional*): Tensors to take from it; all where not given.
        start (`int`), stop (`int`): It holds the latents from the first to before the second.
    """

    path: str | Path
    names: list[str] | None
    start: int
    stop: int


# Names


def is_file_name(name: object) -> bool:
    """Whether a name is one of a file in the folder where it is written, on any system."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    return PurePosixPath(name).name == name == PureWindowsPath(name).name


def is_inner_folder(name: object) -> bool:
    """Whether a relative path stays below where it is written, on any system; `""` is that place itself."""
    if not isinstance(name, str) or "\0" in name or PureWindowsPath(name).drive or PureWindowsPath(name).root:
        return False
    return ".." not in PureWindowsPath(name).parts


def read_shards(index: str | Path) -> dict[str, list[str]]:
    """Names of the tensors in each shard, by transformers' index.

    Raises:
        `SafetensorError`: if it is damaged.
        `ValueError`: if it names files outside its folder.
    """
    try:
        weight_map = read_index_json(index)["weight_map"]
        pairs = [(str(name), shard) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SafetensorError(f"{index} is no index of weights: {error}") from error
    shards: dict[str, list[str]] = {}
    for name, shard in pairs:
        if not is_file_name(shard):
            raise ValueError(
                f"{index} says that {name} lies in {shard!r}. Only files beside the index are read: put the file "
                "there and name it without a folder, if you trust where it comes from."
            )
        shards.setdefault(shard, []).append(name)
    return shards


# Headers


def tensor_shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an SAE, by its config."""
    num_latents, d_in = config.num_latents, config.d_in
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("W_enc", "W_dec"), (num_latents, d_in))
    shapes |= {"b_enc": (num_latents,), "b_dec": (d_in,), "latent_ids": (num_latents,)}
    more = {"batch_topk": ["threshold"], "jumprelu": ["threshold"], "gated": ["r_mag", "b_mag"]}
    return shapes | dict.fromkeys(more.get(config.activation_name, []), (num_latents,))


def check_headers(files: Sequence[WeightFile], config: SAEConfig, source: str | os.PathLike) -> None:
    """Compare what files say they hold with what a config needs; reads no tensor.

    Args:
        files (`Sequence[WeightFile]`): All files with weights, or those with some of the latents and the first.
        config ([`SAEConfig`]): Of the whole dictionary.
        source (`str` or `os.PathLike`): For messages.

    Raises:
        `ValueError`: for other shapes, tensors that hold no floating numbers, or missing ones.
        `SafetensorError`: if a file is damaged.
    """
    shapes, there = tensor_shapes(config), set()
    for part in files:
        with safe_open(part.path, framework="pt") as file:
            for name in sorted(shapes.keys() & set(part.names or file.keys())):
                entry, rows = file.get_slice(name), part.stop - part.start
                shape = shapes[name] if name in WHOLE_TENSORS else (rows, *shapes[name][1:])
                _check_entry(name, part.path, entry.get_dtype(), tuple(entry.get_shape()), shape)
                there.add(name)
    missing = sorted(shapes.keys() - there)
    if missing:
        raise ValueError(
            f"The weights of {source} do not fit its config: {{'missing_keys': {missing}}}. Save or download it again."
        )


def _check_entry(name: str, path: Any, dtype: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Whether one tensor is of the type and shape that it should be."""
    known = _WHOLE_NUMBERS if name == "latent_ids" else _FLOATS
    if dtype not in known:
        raise ValueError(
            f"{name} in {path} is of type {dtype}, and should be one of {', '.join(known)}: it is damaged, or "
            "quantised in a way that is not known here. Save or download it again."
        )
    if shape == expected:
        return
    if len(shape) == len(expected) and shape[1:] == expected[1:] and name not in WHOLE_TENSORS:
        said = f"has {shape[0]} rows where the config or index says {expected[0]}"
    else:
        said = f"is of another type or shape than the config says: {dtype} {shape}, not {expected}"
    raise ValueError(f"{name} in {path} {said}. They do not belong together: save or download them again.")


# Numbers


def check_numbers(tensors: Mapping[str, Tensor], config: SAEConfig, source: str | os.PathLike) -> None:
    """Raises `ValueError` for weights that no SAE can have: not finite, thresholds of JumpReLU below 0, ids below 0.

    A threshold of infinity is that of a latent which never fires. What lies on the meta device is not looked at. Goes
    through each tensor once, in blocks, and keeps nothing.

    Args:
        tensors (`Mapping[str, Tensor]`): An SAE's state dict.
        config ([`SAEConfig`]): Its config.
        source (`str` or `os.PathLike`): For the message.
    """
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        lowest, highest = _extremes(tensor)
        if name == "latent_ids":
            if lowest < 0:
                raise ValueError(f"latent_ids of {source} should be 0 or more, and go down to {lowest}. {_DAMAGED}")
        elif lowest != lowest or lowest == -torch.inf or (highest == torch.inf and name != "threshold"):
            raise ValueError(
                f"{name} of {source} has {_not_finite(tensor):,} entries of {tensor.numel():,} that are no finite "
                f"numbers, as {tensor.dtype}: its training diverged, it is damaged, or its weights are too large for "
                "that type. Take an earlier checkpoint, get it again, or load it with dtype=torch.float32."
            )
        elif name == "threshold" and lowest < 0 and config.activation_name == "jumprelu":
            raise ValueError(f"threshold of {source} should be 0 or more, and goes down to {lowest:g}. {_DAMAGED}")


_DAMAGED = "It is damaged, or was not written by this package: save or download it again."


def _extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest entry; both are NaN where one entry is."""
    lowest, highest = torch.inf, -torch.inf
    for block in _blocks(tensor):
        block = block if block.dtype.itemsize > 1 else block.float()
        low, high = (bound.item() for bound in torch.aminmax(block))
        if low != low:
            return low, high
        lowest, highest = min(lowest, low), max(highest, high)
    return lowest, highest


def _not_finite(tensor: Tensor) -> int:
    return sum(int((~block.isfinite()).sum()) for block in _blocks(tensor))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Runs of rows of a tensor, without a copy; of one that is spread over processes, those of this one."""
    local = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    rows = local if local.dim() else local[None]
    yield from rows.split(max(1, _ENTRIES_AT_ONCE * len(rows) // max(1, rows.numel())))
