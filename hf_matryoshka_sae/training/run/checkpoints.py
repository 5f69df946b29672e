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
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...common.files import write_json
from ...models.safetensors_file import write_tensors


logger = logging.getLogger(__name__)

_TENSOR = "__tensor__"
_MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # of the manifest; the first ones did not say
_NAME = re.compile(r"checkpoint-(\d{8,})")  # eight digits: no folder of transformers' Trainer
_REPLACED = re.compile(r"\.(checkpoint-\d{8,})\.old")
_ROWS = re.compile(r"(.+)-rows-(\d+)-(\d+)\.safetensors")


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None to `path`.safetensors and `path`.json."""
    tensors: dict[str, Tensor] = {}
    skeleton = _stripped(tree, "", tensors)
    write_tensors(f"{path}.safetensors", tensors)  # not with_suffix: a name may have dots
    Path(f"{path}.json").write_text(json.dumps(skeleton), encoding="utf-8")


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
    return _filled(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")), load_file(f"{path}.safetensors"))


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

    def __init__(self, path: Path) -> None:
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
                    for key in file.keys():  # noqa: SIM118  (no mapping)
                        parts.setdefault(key, []).append(file.get_slice(key)[low - first : high - first])
        tensors = {key: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for key, pieces in parts.items()}
        for key, tensor in tensors.items():
            if len(tensor) != stop - start:
                raise ValueError(f"{key} of {name} in {self.path} lacks rows of latents {start} to {stop}.")
        return tensors

    def _pieces(self, name: str) -> list[tuple[int, int, Path]]:
        named = ((_ROWS.fullmatch(path.name), path) for path in self.path.glob(f"{name}-rows-*.safetensors"))
        return sorted((int(match[2]), int(match[3]), path) for match, path in named if match and match[1] == name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Its `step`, `files` with checksums, and since format 1 `format_version`, the `run_id` and the `fields` of its run.

    Raises:
        `ValueError` or `OSError`: if it does not say so.
    """
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("fields", {}), dict):
        raise ValueError(f"its {_MANIFEST} is no manifest")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or any(name != Path(name).name for name in files):
        raise ValueError(f"its {_MANIFEST} names no files")
    return manifest


class Checkpoints:
    """The checkpoints of a run's folder. Every process calls the same methods at the same time.

    Those of another run are neither removed nor replaced.

    Args:
        folder (`Path`): The run's folder; one that all processes share.
        keep (`int`): Whole checkpoints to keep.
        about (`dict`, *optional*): Written into every manifest: the `run_id` and the `fields` of the run.
    """

    def __init__(self, folder: Path, keep: int, about: dict[str, Any] | None = None) -> None:
        self.folder, self.keep, self.about = folder, max(1, keep), about or {}
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._broken: set[Path] = set()

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
        staging = self.folder / self._gathered(_unused_name(final))[0]
        try:
            self._together(final, lambda: staging.mkdir(parents=True) if self.rank == 0 else None)
            parts = self._together(final, lambda: self._write(staging, trees, rows or {}))
            files = {name: digest for part in parts for name, digest in sorted(part.items())}
            self._together(final, lambda: self._publish(staging, final, step, files) if self.rank == 0 else None)
        finally:
            if self.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)  # a half-written one would keep a full disk full
        return final

    def _publish(self, staging: Path, final: Path, step: int, files: dict[str, str]) -> None:
        """Give a complete checkpoint its name, in place of an earlier one of this step, and remove older ones.

        Wherever this is killed, the new or the earlier one is there: [`restore`] names the earlier one again.
        """
        manifest = {"format_version": FORMAT_VERSION, "step": step, **self.about, "files": files}
        write_json(staging / _MANIFEST, manifest)
        _flush(staging / _MANIFEST)
        earlier = final.with_name(f".{final.name}.old")
        if os.path.lexists(final):
            if not self._is_own(final) and final not in self._broken:
                raise FileExistsError(f"{final} is there already and of another run")
            os.replace(final, earlier)
        os.replace(staging, final)
        if os.path.lexists(earlier):
            _discard(earlier)
        self._broken.discard(final)
        older = [path for other, path in self.all() if other < step and self._is_own(path)]
        for path in {*older[: max(0, len(older) - self.keep + 1)], *self._broken}:
            _discard(path)
        self._broken.clear()

    def _is_own(self, path: Path) -> bool:
        """Whether a checkpoint is one of this run; of one that cannot be read nobody knows."""
        try:
            return read_manifest(path).get("run_id") in (None, self.about.get("run_id"))
        except (OSError, ValueError):
            return False

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

    def _together(self, final: Path, work: Callable[[], Any]) -> list[Any]:
        """Call `work` in each process; what it returned in all of them, or an `OSError` in all where it failed."""
        result, error = None, None
        try:
            result = work()
        except OSError as caught:
            error = caught
        outcomes = self._gathered((result, None if error is None else str(error)))
        for rank, (_, reason) in enumerate(outcomes):
            if reason is not None:
                where = f" in process {rank}" if self.world > 1 else ""
                raise OSError(
                    f"{final} could not be saved{where}: {reason}. What was saved before is whole: mend this and run "
                    "the same command again to go on."
                ) from error
        return [value for value, _ in outcomes]

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; waits for them."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def all(self) -> list[tuple[int, Path]]:
        """Step and folder of every checkpoint, broken ones and those of other runs too, the newest last."""
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("checkpoint-*"))
        return sorted((int(match[1]), path) for match, path in named if match)

    def restore(self) -> None:
        """Give a checkpoint that was about to be replaced its name again, if its replacement did not come."""
        for path in self.folder.glob(".checkpoint-*.old"):
            name = _REPLACED.fullmatch(path.name)
            if name and os.path.lexists(self.folder / name[1]):
                _discard(path)
            elif name:
                os.replace(path, self.folder / name[1])

    def load(self, candidates: Sequence[tuple[int, Path]] | None = None) -> tuple[int, Checkpoint] | None:
        """Step and content of the newest whole checkpoint, or None.

        A broken checkpoint is passed over, with a warning, for the one before. Each process verifies its share of the
        files.

        Args:
            candidates (`list[tuple[int, Path]]`, *optional*): Steps and folders, the newest last; all by default.
        """
        if candidates is None:
            if self.rank == 0:
                self.restore()
            candidates = self._gathered(self.all() if self.rank == 0 else None)[0]
        for step, path in reversed(candidates):
            reasons = [reason for reason in self._gathered(self._fault(step, path)) if reason is not None]
            if not reasons:
                return step, Checkpoint(path)
            self._broken.add(path)
            if self.rank == 0:
                logger.warning(f"Checkpoint {path} is broken ({reasons[0]}); trying the one before.")
        return None

    def _fault(self, step: int, path: Path) -> str | None:
        try:
            manifest = read_manifest(path)
            if manifest.get("step") != step:
                return f"it is of step {manifest.get('step')}"
            for name in sorted(manifest["files"])[self.rank :: self.world]:
                if _digest(path / name) != manifest["files"][name]:
                    return f"{name} does not have its checksum"
        except (OSError, ValueError) as error:
            return str(error)
        return None


def _unused_name(path: Path) -> str:
    """A hidden name beside `path` that only this process writes to."""
    return f".{path.name}-{secrets.token_hex(4)}.tmp"


def _discard(path: Path) -> None:
    """Remove a checkpoint: out of sight first, so that no half of it is left under its name."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        doomed = path.with_name(_unused_name(path))
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning(f"{path} could not be removed: {error}.")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Bring a file to the disk before its folder's new name can get there."""
    with open(path, "rb+") as handle:  # Windows flushes only what may be written
        os.fsync(handle.fileno())
