"""Checkpoints that are either whole or absent, and state trees as safetensors + JSON (no pickle).

A checkpoint is written to a folder with a temporary name, every file's checksum goes into `manifest.json`, and the
folder is renamed last. Reading verifies the checksums, so a file damaged later is noticed too.

What has a row for each latent is written by each process for its own latents, and read by ranges: by the same
processes or by fewer or more. (torch.distributed.checkpoint does as much, but keeps its metadata as a pickle.)
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..evaluation.report import write_json
from ..models.safetensors_file import write_tensors


logger = logging.getLogger(__name__)

_TENSOR = "__tensor__"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
_ROWS = re.compile(r"(.+)-rows-(\d+)-(\d+)\.safetensors")


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None to `path`.safetensors and `path`.json."""
    tensors: dict[str, Tensor] = {}
    skeleton = _stripped(tree, "", tensors)
    write_tensors(f"{path}.safetensors", tensors)  # not with_suffix: a name may have dots
    Path(f"{path}.json").write_text(json.dumps(skeleton))


def _stripped(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with names in place of its tensors, which are put into `tensors`."""
    if isinstance(node, Tensor):
        tensors[name] = node
        return {_TENSOR: name}
    if isinstance(node, dict):
        return {str(key): _stripped(value, f"{name}/{key}", tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_stripped(value, f"{name}/{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"{name} of type {type(node).__name__} cannot be saved.")


def load_tree(path: Path) -> Any:
    """What [`save_tree`] wrote to `path`; tensors come back on the CPU."""
    return _filled(json.loads(Path(f"{path}.json").read_text()), load_file(f"{path}.safetensors"))


def _filled(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        named = set(node) == {_TENSOR}
        return tensors[node[_TENSOR]] if named else {key: _filled(node[key], tensors) for key in node}
    return [_filled(value, tensors) for value in node] if isinstance(node, list) else node


class Checkpoint:
    """A whole checkpoint.

    Args:
        path (`Path`): Its folder.
    """

    def __init__(self, path: Path):
        self.path = path

    def tree(self, name: str) -> Any:
        """A state tree by name."""
        return load_tree(self.path / name)

    def rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """The rows of latents `start` to `stop` of each tensor, from whichever files hold them; no others are read."""
        parts: dict[str, list[Tensor]] = {}
        for first, last, path in self._pieces(name):
            low, high = max(first, start), min(last, stop)
            if low < high:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():
                        parts.setdefault(key, []).append(file.get_slice(key)[low - first : high - first])
        found = {key: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for key, pieces in parts.items()}
        for key, tensor in found.items():
            if len(tensor) != stop - start:
                raise ValueError(f"{key} of {name} in {self.path} lacks rows of latents {start} to {stop}.")
        return found

    def _pieces(self, name: str) -> list[tuple[int, int, Path]]:
        named = ((_ROWS.fullmatch(path.name), path) for path in self.path.glob(f"{name}-rows-*.safetensors"))
        return sorted((int(match[2]), int(match[3]), path) for match, path in named if match and match[1] == name)


class Checkpoints:
    """The checkpoints of a run's folder. Every process calls the same methods at the same time.

    Args:
        folder (`Path`): The run's folder; one that all processes share.
        keep (`int`): Whole checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, max(1, keep)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def save(
        self, step: int, trees: Mapping[str, Any], rows: Mapping[str, tuple[int, dict[str, Tensor]]] | None = None
    ) -> Path:
        """Write a checkpoint; returns its folder.

        Args:
            step (`int`): Steps done.
            trees (`Mapping[str, Any]`): State trees that this process writes, by name; no two write the same.
            rows (`Mapping[str, tuple[int, dict]]`, *optional*): By name, the first of this process's latents, and
                tensors with a row for each of them.

        Raises:
            `OSError`: in all processes where one cannot write; the checkpoints before stay.
        """
        final = self.folder / f"checkpoint-{step:08d}"
        staging = self.folder / f".{final.name}.tmp"
        if self.rank == 0:
            for litter in self.folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(litter)
            staging.mkdir(parents=True)
        self._gathered(None)
        error, digests = None, {}
        try:
            digests = self._write(staging, trees, rows or {})
        except OSError as caught:
            error = caught
        told = self._gathered((digests, None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(told):
            if failed is not None:
                raise OSError(f"Process {rank} could not write its part of {final.name}: {failed}")
        if self.rank == 0:
            files = {name: digest for part, _ in told for name, digest in sorted(part.items())}
            write_json(staging / _MANIFEST, {"step": step, "files": files})
            _flush(staging / _MANIFEST)
            if final.exists():
                shutil.rmtree(final)
            os.replace(staging, final)
            for _, old in self._found()[: -self.keep]:
                shutil.rmtree(old)
        self._gathered(None)
        return final

    def _write(self, folder: Path, trees: Mapping[str, Any], rows: Mapping[str, tuple[int, dict]]) -> dict[str, str]:
        """Write this process's files and bring them to the disk; their checksums by name."""
        paths = []
        for name, tree in trees.items():
            save_tree(folder / name, tree)
            paths += [folder / f"{name}.safetensors", folder / f"{name}.json"]
        for name, (first, tensors) in rows.items():
            last = first + len(next(iter(tensors.values())))
            paths.append(folder / f"{name}-rows-{first}-{last}.safetensors")
            write_tensors(paths[-1], tensors)
        for path in paths:
            _flush(path)
        return {path.name: _digest(path) for path in paths}

    def _gathered(self, value: Any) -> list[Any]:
        """What all processes say, in their order; waits for them."""
        told = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(told, value)
        return told

    def _found(self) -> list[tuple[int, Path]]:
        named = ((_NAME.match(path.name), path) for path in self.folder.glob("checkpoint-*"))
        return sorted((int(match[1]), path) for match, path in named if match)

    def load(self) -> tuple[int, Checkpoint] | None:
        """Step and content of the newest whole checkpoint, or None.

        A broken checkpoint is passed over, with a warning, for the one before. Each process verifies its share of the
        files.
        """
        for step, path in reversed(self._found()):
            reasons = [reason for reason in self._gathered(self._fault(path)) if reason is not None]
            if not reasons:
                return step, Checkpoint(path)
            if self.rank == 0:
                logger.warning(f"Checkpoint {path} is broken ({reasons[0]}); trying the one before.")
        return None

    def _fault(self, path: Path) -> str | None:
        try:
            files = json.loads((path / _MANIFEST).read_text())["files"]
            for name in sorted(files)[self.rank :: self.world]:
                if _digest(path / name) != files[name]:
                    return f"{name} does not have its checksum"
        except (OSError, ValueError, KeyError) as error:
            return str(error)
        return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Bring a file to the disk before its folder's new name can get there."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
