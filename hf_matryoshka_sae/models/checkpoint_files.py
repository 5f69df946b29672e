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
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


_FILE_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_WHOLE_TENSORS = {"b_dec"}  # has no latent axis
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def staged_files(target: Path, keep_others: bool = False) -> Iterator[Path]:
    """A folder to write a checkpoint's files to; when the block ends they take their places in `target`.

    Every file is complete before it takes its name, the config comes last, and nothing changes where the block raises.

    Args:
        target (`Path`): Where the files belong; made if it is not there.
        keep_others (`bool`, *optional*, defaults to `False`): Leave weights of an earlier save in other shards.
    """
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield staging
        written = {file.name for file in staging.iterdir()}
        for name in written - {"config.json"}:
            os.replace(staging / name, target / name)
        # Weights of an earlier save in other shards; `model.safetensors` would be read before a new index.
        for file in [] if keep_others else list(target.iterdir()):
            if _WEIGHTS.fullmatch(file.name) and file.name not in written:
                file.unlink()
        os.replace(staging / "config.json", target / "config.json")
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
    """
    where = {key: kwargs[key] for key in _FILE_KEYS if key in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
        overrides = {key: kwargs.pop(key) for key in own & kwargs.keys()}
        config = config_class.from_pretrained(source, **where, **overrides)
    else:
        config = copy.deepcopy(config)
    state = {}
    for path, names in _weight_files(source, where):
        with safe_open(path, framework="pt") as file:
            for name in names or file.keys():
                rows = file.get_slice(name)
                if name not in _WHOLE_TENSORS and rows.get_shape()[0] != config.num_latents:
                    raise ValueError(
                        f"{name} in {path} has {rows.get_shape()[0]} rows where the config says {config.num_latents}."
                    )
                state[name] = file.get_tensor(name) if name in _WHOLE_TENSORS else rows[:width]
    for name, value in config.truncated(width).items():
        setattr(config, name, value)
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = state["W_enc"].dtype if "W_enc" in state else torch.float32
    return config, state


def _weight_files(source, where: dict) -> list[tuple[str, list[str] | None]]:
    single = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **where)
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
    return [(cached_file(source, shard, **where), names) for shard, names in shards.items()]
