"""Checkpoints that are either whole or absent, and state trees as safetensors + JSON (no pickle).

A checkpoint is written to a folder with a temporary name, every file's checksum goes into `manifest.json`, and the
folder is renamed last. Reading verifies the checksums, so a file damaged later is noticed too.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation.report import write_json


logger = logging.getLogger(__name__)

_TENSOR = "__tensor__"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None to `path`.safetensors and `path`.json."""
    tensors: dict[str, Tensor] = {}

    def strip(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(node, dict):
            return {str(key): strip(value, f"{name}/{key}") for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [strip(value, f"{name}/{i}") for i, value in enumerate(node)]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"{name} of type {type(node).__name__} cannot be saved.")

    skeleton = strip(tree, "")
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(skeleton))


def load_tree(path: Path) -> Any:
    """What [`save_tree`] wrote to `path`; tensors come back on the CPU."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return tensors[node[_TENSOR]] if set(node) == {_TENSOR} else {key: fill(node[key]) for key in node}
        return [fill(value) for value in node] if isinstance(node, list) else node

    return fill(json.loads(path.with_suffix(".json").read_text()))


class Checkpoints:
    """The checkpoints of a run's folder.

    Args:
        folder (`Path`): The run's folder.
        keep (`int`): Whole checkpoints to keep.
        rank (`int`): Of this process; 0 renames and tidies.
        barrier (`Callable`): Waits for all processes.
    """

    def __init__(self, folder: Path, keep: int, rank: int, barrier: Callable[[], None]):
        self.folder, self.keep, self.rank, self.barrier = folder, max(1, keep), rank, barrier

    def save(self, step: int, shared: Any, own: Any) -> Path:
        """Write a checkpoint; returns its folder.

        Args:
            step (`int`): Steps done.
            shared (`Any`): State tree that is equal in all processes.
            own (`Any`): State tree of this process.
        """
        final = self.folder / f"checkpoint-{step:08d}"
        staging = self.folder / f".{final.name}.tmp"
        if self.rank == 0:
            for litter in self.folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(litter)
            staging.mkdir(parents=True)
        self.barrier()
        save_tree(staging / f"process-{self.rank}", own)
        if self.rank == 0:
            save_tree(staging / "shared", shared)
        self.barrier()
        if self.rank == 0:
            files = {file.name: _digest(file) for file in sorted(staging.iterdir())}
            write_json(staging / _MANIFEST, {"step": step, "files": files})
            _flush(staging)
            if final.exists():
                shutil.rmtree(final)
            os.replace(staging, final)
            self._tidy()
        self.barrier()
        return final

    def _tidy(self) -> None:
        for _, old in self._found()[: -self.keep]:
            shutil.rmtree(old)

    def _found(self) -> list[tuple[int, Path]]:
        named = ((_NAME.match(path.name), path) for path in self.folder.glob("checkpoint-*"))
        return sorted((int(match[1]), path) for match, path in named if match)

    def load(self) -> tuple[int, Any, Any] | None:
        """Step, shared state and own state of the newest whole checkpoint, or None.

        A broken checkpoint is passed over, with a warning, for the one before.
        """
        for step, path in reversed(self._found()):
            try:
                self._verify(path)
                return step, load_tree(path / "shared"), load_tree(path / f"process-{self.rank}")
            except (OSError, ValueError, KeyError) as error:
                if self.rank == 0:
                    logger.warning(f"Checkpoint {path} is broken ({error}); trying the one before.")
        return None

    def _verify(self, path: Path) -> None:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if _digest(path / name) != digest:
                raise ValueError(f"{name} does not have its checksum")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Bring a folder's files to the disk before its new name can get there."""
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
