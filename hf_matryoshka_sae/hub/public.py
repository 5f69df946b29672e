"""Make a run's fields public: Hub ids stay, paths and names of this machine become words."""

import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..activations.language_model import EMBEDDED
from ..training import RunConfig


LOCAL_MODEL, LOCAL_DATA, LOCAL_SAE = "a local language model", "a local data set", "a local SAE"
LOCAL_CACHE, OUTPUT = "a local cache", "runs/sae"

_FILES = (".parquet", ".jsonl", ".json", ".txt")


def hub_id(name: str | None, here: bool | None = None) -> str | None:
    """Return the name if it is a Hub repository's, else `None`: for `embedded`, files and folders.

    Args:
        name (`str`, *optional*): Name or path in a run's YAML.
        here (`bool`, *optional*): Whether it was a file or folder in training; looked up now where that is not known.
    """
    if not name or name == EMBEDDED or name.startswith((".", "/", "~")) or name.endswith(_FILES):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if (Path(name).exists() if here is None else here) else name


def stand_ins(config: RunConfig, on_this_machine: Collection[str] | None) -> dict[str, str]:
    """Return the paths and names of this machine in a run's fields, with the public words for each.

    Args:
        config ([`RunConfig`]): The run.
        on_this_machine (`Collection[str]`, *optional*): The fields that named a file or folder in training, as
            `provenance.json` lists them; looked up now where that is not known.
    """
    listed = on_this_machine or ()
    texts = {"dataset": config.dataset, "eval_dataset": config.eval_dataset}
    data = {name: text and text.path for name, text in texts.items()}
    places = {path: LOCAL_DATA for name, path in data.items() if _is_private(path, name, on_this_machine)}
    if _is_private(config.model, "model", on_this_machine):
        places[config.model] = LOCAL_MODEL
    origins = {"init_from": config.init_from}
    for i, spec in enumerate(config.saes):
        origins |= {f"saes.{i}.init_from": spec.init_from, f"saes.{i}.grow_from": spec.grow_from}
    for name, path in origins.items():  # earlier versions do not list these
        if path and hub_id(path, True if name in listed else None) is None:
            places[path] = LOCAL_SAE
    if config.activation_cache and not config.activation_cache.startswith("hf://"):
        places[config.activation_cache] = LOCAL_CACHE
    return places | {config.output_dir: OUTPUT}


def _is_private(path: str | None, name: str, on_this_machine: Collection[str] | None) -> bool:
    here = None if on_this_machine is None else name in on_this_machine
    return bool(path) and path != EMBEDDED and hub_id(path, here) is None


def public_fields(fields: Any, places: dict[str, str]) -> Any:
    """Return nested fields of a run with the paths of this machine replaced by the words of [`stand_ins`]."""
    if isinstance(fields, dict):
        return {name: public_fields(value, places) for name, value in fields.items()}
    if isinstance(fields, list):
        return [public_fields(value, places) for value in fields]
    return places.get(fields, fields) if isinstance(fields, str) else fields


def public_command(command: str, places: dict[str, str]) -> str:
    """Return a command line with the words of [`stand_ins`], and `run.yaml` for the file of its fields.

    Args:
        command (`str`): Command line in `provenance.json`, where absolute paths are cut to their last part already.
        places (`dict[str, str]`): Words by path, as [`stand_ins`] returns them.
    """
    names = {path.rstrip("/"): words for path, words in places.items()}
    names = {Path(path).name: words for path, words in names.items()} | names
    patterns = [rf"(?<![\w.-]){re.escape(name)}(?![\w-])" for name in sorted(names, key=len, reverse=True) if name]
    pattern = re.compile("|".join(patterns))
    words = shlex.split(command)
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    for i in range(first, len(words)):
        flag, equals, value = words[i].partition("=")
        if flag == "--config" and equals:
            words[i] = "--config=run.yaml"
        elif words[i - 1] == "--config":
            words[i] = "run.yaml"
        elif equals or not flag.startswith("--"):
            value = pattern.sub(lambda match: names[match[0]], value if equals else flag)
            words[i] = f"{flag}={value}" if equals else value
    return shlex.join(words)


def public_config(config: dict[str, Any], here: bool | None = None) -> dict[str, Any]:
    """Return an SAE's config without the name of a language model that is not on the Hub.

    Elsewhere such a name would mean nothing, or another model.

    Args:
        config (`dict`): Content of `config.json`.
        here (`bool`, *optional*): Whether the model was a folder in training; looked up now where that is not known.
    """
    model = config.get("base_model")
    if model == EMBEDDED or hub_id(model, here):
        return config
    return {name: value for name, value in config.items() if name != "base_model"}


def public_index(about: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Return the description of a feature index without names of local models and data.

    Args:
        about (`dict`): Content of its `index.json`, which keeps only the last part of a local path.
        model (`str`, *optional*): Name of the language model in the SAE's public config.
    """
    if model is None or about.get("base_model") != model:
        about = about | {"base_model": LOCAL_MODEL, "tokenizer": LOCAL_MODEL}
    data = about.get("dataset")
    if isinstance(data, dict):
        path = str(data.get("path"))
        # The last part of a folder looks like the id of a data set that belongs to nobody.
        known = path == EMBEDDED or ("/" in path and hub_id(path) is not None)
        about = about | {"dataset": data | {"path": path if known else LOCAL_DATA}}
    return about
