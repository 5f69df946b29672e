"""The files of a checkpoint: read whole or only some of the latents."""

import copy
import json
import os
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

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

from .configuration_sae import CONFIGS, SAEConfig
from .digests import DIGESTS_NAME, digests_of_piece
from .hub_failures import fetching, hub_failed, optional_file
from .partial_download import NotInCache, PartialFile, RangesRefused, warn_of_whole_file
from .pieces import PIECES_INDEX_NAME, WHOLE_TENSORS, Piece, read_index
from .weight_checks import WeightFile, check_headers, check_numbers, read_shards, tensor_shapes


_ATTEMPTS = 5
_FILE_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def read_prefix(config_class: type, source: str | os.PathLike, width: int | None, kwargs: dict) -> tuple:
    """The config and the tensors of the first `width` latents, or of all.

    Args:
        config_class (`type`): Class of the config.
        source (`str` or `os.PathLike`): Folder or repository id.
        width (`int`, *optional*): Latents to read; all where not given.
        kwargs (`dict`): What `from_pretrained` got; where the files are is read from it.

    Returns:
        The truncated config and a state dict.

    Raises:
        `ValueError`: if `width` does not fit the checkpoint.
        `OSError`: if the files are not there or cannot be fetched.
    """
    where, commit = pinned(source, kwargs)
    config = asked_config(config_class, source, where, kwargs)
    # A width it does not have is refused before anything is fetched.
    changed = {} if width is None else config.truncated(width)
    state = _read_rows(source, where, commit, 0, width, config)
    for name, value in changed.items():
        setattr(config, name, value)
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = state["W_enc"].dtype if "W_enc" in state else torch.float32
    return config, state


def asked_config(config_class: type, source: str | os.PathLike, where: dict, kwargs: dict) -> SAEConfig:
    """The config that `from_pretrained` got, or the checkpoint's with the fields that it got, which are taken out."""
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config)
    own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    overrides = {key: kwargs.pop(key) for key in own & kwargs.keys()}
    return config_class.from_pretrained(source if config is None else config, **where, **overrides)


def read_latents(
    source: str | os.PathLike, start: int, stop: int, **where: Any
) -> tuple[SAEConfig, dict[str, torch.Tensor]]:
    """Some latents of a dictionary, and `b_dec`: what a process loads that holds a part of it.

    In a folder no other rows are read. From the Hub, those before `start` are fetched too that lie in the same file
    as the first of these: the cache holds a file from its beginning on. So of a dictionary in pieces a part costs its
    own pieces, and of one in a single file all that comes before `stop`.

    Args:
        source (`str` or `os.PathLike`): Folder or repository id.
        start (`int`), stop (`int`): The latents from the first to before the second.
        where: As in `from_pretrained`: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
            `force_download`.

    Returns:
        `tuple[SAEConfig, dict[str, Tensor]]`: The config of the whole dictionary, and a state dict of `stop - start`
        rows of each tensor, as they are stored, and `b_dec` whole.

    Raises:
        `ValueError`: if the range does not fit the dictionary, or a file is damaged.
        `OSError`: if the files are not there or cannot be fetched.
    """
    unknown = where.keys() - set(_FILE_KEYS)
    if unknown:
        raise TypeError(f"read_latents() got unexpected arguments: {sorted(unknown)}.")
    place, commit = pinned(source, where)
    fields, _ = SAEConfig.get_config_dict(source, **place)
    kinds = {config.model_type: config for config in CONFIGS.values()}
    if fields.get("model_type") not in kinds:
        raise ValueError(f"{source} is no SAE: its config names the model type {fields.get('model_type')!r}.")
    config = kinds[fields["model_type"]].from_pretrained(source, **place)
    if not 0 <= start < stop <= config.num_latents:
        raise ValueError(
            f"`start` and `stop` must be a range of latents between 0 and num_latents ({config.num_latents}), got "
            f"{start!r} and {stop!r}."
        )
    with failures_named(source, where):
        state = _read_rows(source, place, commit, start, stop, config)
        check_numbers(state, config, source)
        return config, state


@contextmanager
def failures_named(source: str | os.PathLike, kwargs: dict) -> Iterator[None]:
    """Say what failed requests and damaged files mean, and drop what was fetched of the latter.

    Args:
        source (`str` or `os.PathLike`): Folder or repository id.
        kwargs (`dict`): What `from_pretrained` got.
    """
    try:
        with fetching(source, kwargs):
            yield
    except (SafetensorError, json.JSONDecodeError) as error:
        forget_partial_files(source, kwargs)
        raise ValueError(
            f"The weights of {source} cannot be read ({error}). The file is damaged or half-written: "
            "save or download it again."
        ) from error


def in_pieces(source: str | os.PathLike, kwargs: dict) -> bool:
    """Whether the weights lie in pieces, which transformers cannot read; by the arguments of `from_pretrained`."""
    if kwargs.get("variant"):
        return False
    where, _ = pinned(source, kwargs)
    return _pieces_index(source, where) is not None


def _pieces_index(source: str | os.PathLike, where: dict) -> str | None:
    return optional_file(source, PIECES_INDEX_NAME, where)


def weight_files(folder: str | os.PathLike, num_latents: int) -> list[WeightFile]:
    """The files of the weights in a folder, whichever way they are split.

    Args:
        folder (`str` or `os.PathLike`): Of a saved SAE.
        num_latents (`int`): F, by its config.

    Raises:
        `ValueError` or `SafetensorError`: if an index does not fit.
        `OSError`: if there are no weights.
    """
    return _weight_files(folder, {}, None, 0, None, num_latents)


def _read_rows(
    source: str | os.PathLike, where: dict, commit: str | None, start: int, stop: int | None, config: SAEConfig
) -> dict[str, torch.Tensor]:
    """The rows from `start` to `stop` of every tensor, and those that have no latent axis."""
    for attempt in range(_ATTEMPTS):
        try:
            files = _weight_files(source, where, commit, start, stop, config.num_latents)
            check_headers(files, config, source)
            return _join(files, start, config.num_latents if stop is None else stop, tensor_shapes(config).keys())
        except FileNotFoundError:
            # Another process may have completed a file, or begun it anew, so that it lies elsewhere now.
            if commit is None or where.get("local_files_only") or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _join(files: list[WeightFile], start: int, stop: int, wanted: Set[str]) -> dict[str, torch.Tensor]:
    """The rows of the dictionary from `start` to `stop` of the tensors `wanted`, out of the files that have them."""
    state: dict[str, torch.Tensor] = {}
    expected: set[str] | None = None
    for part in files:
        begin, end = max(start, part.start), min(stop, part.stop)
        with safe_open(part.path, framework="pt") as file:
            names = part.names or file.keys()
            if part.names is None:
                expected = _same_names(part.path, set(names) - WHOLE_TENSORS, expected)
            for name in wanted & set(names):
                stored = file.get_slice(name)
                if name in WHOLE_TENSORS:
                    state[name] = file.get_tensor(name)
                    continue
                if begin >= end:  # a first piece that is here for what has no latent axis
                    continue
                rows = stored[begin - part.start : end - part.start]  # a view of the file: nothing is read yet
                if len(rows) == stop - start:
                    state[name] = rows
                    continue
                if name not in state:
                    state[name] = rows.new_empty(stop - start, *rows.shape[1:])
                if (state[name].dtype, state[name].shape[1:]) != (rows.dtype, rows.shape[1:]):
                    raise ValueError(f"{name} in {part.path} is of another type or shape than in the piece before.")
                state[name][begin - start : end - start] = rows
    return state


def _same_names(path: str | Path, names: set[str], expected: set[str] | None) -> set[str]:
    """The names of a piece's tensors, which should be those of the pieces before it."""
    if expected is not None and names != expected:
        raise ValueError(
            f"{path} does not hold the same tensors as the pieces before it: {', '.join(sorted(names ^ expected))}."
        )
    return names


def _weight_files(
    source: str | os.PathLike, where: dict, commit: str | None, start: int, stop: int | None, num_latents: int
) -> list[WeightFile]:
    """The files that have latents `start` to `stop`, and what has no latent axis."""
    index = _pieces_index(source, where)
    if index is not None:
        pieces = read_index(index)
        if pieces[-1].stop != num_latents:
            raise ValueError(f"{index} is of {pieces[-1].stop} latents where the config says {num_latents}.")
        return [_piece(source, piece, where, commit, start, stop) for piece in _asked(pieces, start, stop)]
    single = _file(source, SAFE_WEIGHTS_NAME, where, commit, stop, optional=True)
    if single is not None:
        return [WeightFile(single, None, 0, num_latents)]
    shards = read_shards(cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **where))
    paths = {shard: _file(source, shard, where, commit, stop) for shard in shards}
    return [WeightFile(paths[shard], names, 0, num_latents) for shard, names in shards.items()]


def _asked(pieces: list[Piece], start: int, stop: int | None) -> list[Piece]:
    """The pieces with any of these latents; and the first, which has what has no latent axis."""
    return [
        piece for piece in pieces if piece.start == 0 or (start < piece.stop and (stop or piece.stop) > piece.start)
    ]


def _piece(
    source: str | os.PathLike, piece: Piece, where: dict, commit: str | None, start: int, stop: int | None
) -> WeightFile:
    """A piece, of which at least the rows between these are there."""
    width = None
    if stop is not None:
        width = min(stop, piece.stop) - piece.start if start < piece.stop else 0
    path = _file(source, piece.file, where, commit, width, piece=piece)
    return WeightFile(path, None, piece.start, piece.stop)


def _file(
    source: str | os.PathLike,
    name: str,
    where: dict,
    commit: str | None,
    width: int | None,
    optional: bool = False,
    piece: Piece | None = None,
) -> Any:
    """A file with at least the first `width` rows of its tensors; from the Hub, no more than those is fetched."""

    def published(again: bool) -> dict | None:
        digests = _published_digests(source, where, again)
        return digests if digests is None or piece is None else digests_of_piece(digests, piece.start, piece.stop)

    if not Path(source).is_dir() and commit is not None:
        part = _partial_file(source, name, where, commit)
        force = bool(where.get("force_download"))
        whole = None if force else part.whole()
        if whole is not None:
            return whole
        if piece is not None and width is None and not part.begun:
            return cached_file(source, name, **where)
        try:
            return part.fetch(width, WHOLE_TENSORS, published, force)
        except RangesRefused as reason:
            warn_of_whole_file(part.filename, part.repo_id, reason)
            part.forget()
        except (EntryNotFoundError, NotInCache) as error:
            if hub_failed(error):
                raise
            # Not there, or this is offline: it may lie in shards, of which the index then is in the cache.
            if optional and (not part.offline or part.sibling_cached(SAFE_WEIGHTS_INDEX_NAME)):
                return None
            raise
    return optional_file(source, name, where) if optional else cached_file(source, name, **where)


def _partial_file(source: str | os.PathLike, name: str, where: dict, commit: str) -> PartialFile:
    filename = "/".join(filter(None, ((where.get("subfolder") or "").strip("/"), name)))
    offline = bool(where.get("local_files_only"))
    return PartialFile(str(source), filename, commit, where.get("token"), where.get("cache_dir"), offline)


def pinned(source: str | os.PathLike, kwargs: dict) -> tuple[dict, str | None]:
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


def _published_digests(source: str | os.PathLike, where: dict, again: bool) -> dict | None:
    """The digests that were pushed with the weights; `None` where there are none. A damaged file is fetched anew."""
    for force in (again, True):
        asked = where | {"force_download": force}
        file = optional_file(source, DIGESTS_NAME, asked)
        if file is None:
            return None
        try:
            digests = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(digests, dict):
            return digests
    return None


def forget_partial_files(source: str | os.PathLike, kwargs: dict) -> None:
    """Drop what was fetched in part of an SAE's weights: it turned out to be damaged."""
    if source is not None and not Path(source).is_dir():
        for path in _begun(source, kwargs)[0]:
            path.forget()


def complete_partial_files(source: str | os.PathLike, kwargs: dict) -> None:
    """Fetch what is missing of weights whose first latents were fetched before, so that nothing is fetched twice.

    Where no part is there, the whole is: transformers would take a Hub that fails for one that has no weights.
    """
    if source is None or Path(source).is_dir() or kwargs.get("force_download"):
        return
    parts, where, commit = _begun(source, kwargs)
    for part in parts:
        _file(source, Path(part.filename).name, where, commit, None)
    if not parts and not kwargs.get("variant"):
        where = where or pinned(source, kwargs)[0]
        optional_file(source, SAFE_WEIGHTS_NAME, where)
        kwargs |= {"revision": where["revision"]} if "revision" in where else {}  # resolved but once


def _begun(source: str | os.PathLike, kwargs: dict) -> tuple[list[PartialFile], dict, str | None]:
    """The files of an SAE's weights of which a part is in the cache; where they are, and of which commit."""
    references = _partial_file(source, SAFE_WEIGHTS_NAME, kwargs, "").references
    if not references.is_dir():
        return [], {}, None
    where, commit = pinned(source, kwargs)
    if commit is None:
        return [], where, None
    folder = references / commit / (where.get("subfolder") or "")
    return (
        [_partial_file(source, path.name, where, commit) for path in folder.glob("*.safetensors")],
        where,
        commit,
    )
