"""The files of a checkpoint: written whole or not at all, read whole or only the first latents."""

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    resolve_revision,
)

from .digests import DIGESTS_NAME
from .partial_download import NotInCache, PartialFile, RangesRefused, warn_of_whole_file


WHOLE_TENSORS = {"b_dec"}  # has no latent axis

_FILE_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def staged_files(target: Path, keep_others: bool = False, last: str = "config.json") -> Iterator[Path]:
    """A folder to write a checkpoint's files to; when the block ends they take their places in `target`.

    Every file is complete before it takes its name, the file `last` comes last, and nothing changes where the block
    raises.

    Args:
        target (`Path`): Where the files belong; made if it is not there.
        keep_others (`bool`, *optional*, defaults to `False`): Leave weights of an earlier save in other shards.
        last (`str`, *optional*, defaults to `"config.json"`): The file by which a reader knows that all are there.
    """
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield staging
        written = {file.name for file in staging.iterdir()}
        for name in written - {last}:
            os.replace(staging / name, target / name)
        # Weights of an earlier save in other shards; `model.safetensors` would be read before a new index.
        for file in [] if keep_others else list(target.iterdir()):
            if _WEIGHTS.fullmatch(file.name) and file.name not in written:
                file.unlink()
        os.replace(staging / last, target / last)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_prefix(config_class, source, width: int, kwargs: dict) -> tuple:
    """The config and the tensors of the first `width` latents.

    Args:
        config_class (`type`): Class of the config.
        source (`str` or `os.PathLike`): Folder or repository id.
        width (`int`): Latents to read.
        kwargs (`dict`): What `from_pretrained` got; where the files are is read from it.

    Returns:
        The truncated config and a state dict.

    Raises:
        `ValueError`: if `width` does not fit the checkpoint.
        `OSError`: if the files are not there or cannot be fetched.
    """
    where, commit = _pinned(source, kwargs)
    config = kwargs.pop("config", None)
    if config is None:
        own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
        overrides = {key: kwargs.pop(key) for key in own & kwargs.keys()}
        config = config_class.from_pretrained(source, **where, **overrides)
    else:
        config = copy.deepcopy(config)
    config.truncated(width)  # a width it does not have is refused before anything is fetched
    try:
        state = _read_rows(source, where, commit, width, config.num_latents)
    except FileNotFoundError:
        if commit is None or where.get("local_files_only"):
            raise
        # Another process has completed the file meanwhile, and it lies elsewhere now.
        state = _read_rows(source, where, commit, width, config.num_latents)
    for name, value in config.truncated(width).items():
        setattr(config, name, value)
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = state["W_enc"].dtype if "W_enc" in state else torch.float32
    return config, state


def _read_rows(source, where: dict, commit: str | None, width: int, num_latents: int) -> dict[str, torch.Tensor]:
    """The first `width` rows of every tensor."""
    state = {}
    for path, names in _weight_files(source, where, commit, width):
        with safe_open(path, framework="pt") as file:
            for name in names or file.keys():
                rows = file.get_slice(name)
                if name not in WHOLE_TENSORS and rows.get_shape()[0] != num_latents:
                    raise ValueError(
                        f"{name} in {path} has {rows.get_shape()[0]} rows where the config says {num_latents}."
                    )
                state[name] = file.get_tensor(name) if name in WHOLE_TENSORS else rows[:width]
    return state


def _weight_files(
    source, where: dict, commit: str | None, width: int | None
) -> list[tuple[str | Path, list[str] | None]]:
    """The files of the weights, and which tensors to take from each (all, where not said)."""
    single = _file(source, SAFE_WEIGHTS_NAME, where, commit, width, optional=True)
    if single is not None:
        return [(single, None)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **where)
    try:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise SafetensorError(f"{index} is no index of weights: {error}") from error
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    return [(_file(source, shard, where, commit, width), names) for shard, names in shards.items()]


def _file(source, name: str, where: dict, commit: str | None, width: int | None, optional: bool = False):
    """A file with at least the first `width` rows of its tensors; from the Hub, no more than those is fetched."""
    if not Path(source).is_dir() and commit is not None:
        part = _partial_file(source, name, where, commit)
        force = bool(where.get("force_download"))
        whole = None if force else part.whole()
        if whole is not None:
            return whole
        try:
            return part.fetch(width, WHOLE_TENSORS, lambda again: _published_digests(source, where, again), force)
        except RangesRefused as reason:
            warn_of_whole_file(part.filename, part.repo_id, reason)
            part.forget()
        except (EntryNotFoundError, NotInCache):
            # Not there, or this is offline: it may lie in shards, of which the index then is in the cache.
            if optional and (not part.offline or part.sibling_cached(SAFE_WEIGHTS_INDEX_NAME)):
                return None
            raise
    return cached_file(source, name, _raise_exceptions_for_missing_entries=not optional, **where)


def _partial_file(source, name: str, where: dict, commit: str) -> PartialFile:
    filename = "/".join(filter(None, ((where.get("subfolder") or "").strip("/"), name)))
    offline = bool(where.get("local_files_only"))
    return PartialFile(str(source), filename, commit, where.get("token"), where.get("cache_dir"), offline)


def _pinned(source, kwargs: dict) -> tuple[dict, str | None]:
    """Where the files are, by the arguments of `from_pretrained`, and the commit they are of (`None` in a folder)."""
    where = {key: kwargs[key] for key in _FILE_KEYS if key in kwargs}
    asked = {key: where[key] for key in ("token", "cache_dir", "local_files_only") if key in where}
    revision = resolve_revision(source, where.get("revision"), **asked)
    commit = getattr(revision, "resolved", revision)
    if revision is not None:
        where["revision"] = revision
    if re.fullmatch(r"[0-9a-f]{40}", commit or ""):
        return where, commit
    if source is None or Path(source).is_dir():
        return where, None
    # The Hub did not say which commit it is; the place of a file in the cache does.
    return where, extract_commit_hash(cached_file(source, CONFIG_NAME, **where), None)


def _published_digests(source, where: dict, again: bool) -> dict | None:
    """The digests that were pushed with the weights; `None` where there are none. A damaged file is fetched anew."""
    for force in (again, True):
        asked = where | {"force_download": force}
        found = cached_file(source, DIGESTS_NAME, _raise_exceptions_for_missing_entries=False, **asked)
        if found is None:
            return None
        try:
            digests = json.loads(Path(found).read_text())
        except ValueError:
            continue
        if isinstance(digests, dict):
            return digests
    return None


def forget_partial_files(source, kwargs: dict) -> None:
    """Drop what was fetched in part of an SAE's weights: it turned out to be damaged."""
    if source is not None and not Path(source).is_dir():
        for path in _begun(source, kwargs)[0]:
            path.forget()


def complete_partial_files(source, kwargs: dict) -> None:
    """Fetch what is missing of weights whose first latents were fetched before, so that nothing is fetched twice.

    Does nothing for a folder, or where no part is in the cache.
    """
    if source is None or Path(source).is_dir() or kwargs.get("force_download"):
        return
    parts, where, commit = _begun(source, kwargs)
    for part in parts:
        _file(source, Path(part.filename).name, where, commit, None)


def _begun(source, kwargs: dict) -> tuple[list[PartialFile], dict, str | None]:
    """The files of an SAE's weights of which a part is in the cache; where they are, and of which commit."""
    references = _partial_file(source, SAFE_WEIGHTS_NAME, kwargs, "").references
    if not references.is_dir():
        return [], {}, None
    where, commit = _pinned(source, kwargs)
    if commit is None:
        return [], where, None
    folder = references / commit / (where.get("subfolder") or "")
    return (
        [_partial_file(source, path.name, where, commit) for path in folder.glob("model*.safetensors")],
        where,
        commit,
    )
