"""What cached hidden states depend on, as named fields that are compared one by one."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..text.documents import DatasetConfig
from ..text.tokens import TokenStream


_SAMPLED_VALUES = 4096  # of each weight: enough to notice any training, little enough for the largest model
_SAMPLED_BYTES = 2**16


def cache_fingerprint(
    model: nn.Module,
    token_stream: TokenStream,
    dataset: DatasetConfig,
    hookpoints: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """Return everything that cached hidden states depend on, as JSON-able values.

    Args:
        model (`nn.Module`): the language model; its config and a sample of each weight are hashed.
        token_stream ([`TokenStream`]): its tokenizer is hashed, its options are listed.
        dataset ([`DatasetConfig`]): the text; the size and ends of a local file are hashed too.
        hookpoints (`list[str]`): what is cached.
        more: whatever else decides which rows are cached, such as `max_norm_factor`; JSON-able.

    Returns:
        `dict`: named fields, compared one by one when a cache is opened. In which type rows are stored is none of
        them: a run may read any.
    """
    return {
        "model": _digest(type(model).__name__, _config(model), *_weights(model)),
        "tokenizer": _digest(*_tokenizer(token_stream.tokenizer)),
        "dataset": _text(dataset),
        "context_length": token_stream.context_length,
        "pack": token_stream.pack,
        "add_bos": token_stream.add_bos,
        "exclude": token_stream.exclude,
        "hookpoints": list(hookpoints),
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


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
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
    for name in ("streaming", "source_column"):  # how it is read, and by what it is reported, change no state
        del fields[name]
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


def differing_fields(own: dict[str, Any], cached: dict[str, Any]) -> list[str]:
    """Describe each field in which two fingerprints differ; `cached` may have more hookpoints."""
    own = json.loads(json.dumps(own))  # tuples are lists there
    if set(own["hookpoints"]) <= set(cached["hookpoints"]):
        own["hookpoints"] = cached["hookpoints"]
    return [
        f"{name} is {cached.get(name)} there, {own.get(name)} here"
        for name in dict.fromkeys([*own, *cached])
        if own.get(name) != cached.get(name)
    ]
