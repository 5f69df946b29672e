"""Reading a config that anybody may have written: whatever is wrong with it is a `ValueError` that names it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError


_MOST_ENTRIES = 100_000  # of a field, such as prefix widths
_LARGEST = 2**62

# What the classes of transformers raise where a file's JSON is not what they take for granted.
_UNFIT = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_AGAIN = "Save or download it again; from the Hub, `force_download=True` replaces a damaged copy in the cache."


@contextmanager
def unfit_config_named(source: str | os.PathLike) -> Iterator[None]:
    """Around reading a config: what its content makes transformers raise becomes a `ValueError` that names it.

    Args:
        source (`str` or `os.PathLike`, *optional*): Folder, file or repository id, where it is known.
    """
    name = "The config" if source is None else f"config.json of {source}"
    try:
        yield
    except _UNFIT as error:
        raise ValueError(f"{name} is damaged: {_first_lines(error)} {_AGAIN}") from error
    except OSError as error:
        if "valid JSON" not in str(error):
            raise
        raise ValueError(f"{name} is damaged: {error} {_AGAIN}") from error
    except ValueError as error:
        if source is None or str(source) in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def _first_lines(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300].rstrip('.') or type(error).__name__}."


def check_content(content: object) -> None:
    """Raises `ValueError` for what would take long to refuse later, or what only loading would stumble over."""
    if not isinstance(content, dict):
        raise ValueError(f"it should hold an object, and holds a {type(content).__name__}. {_AGAIN}")
    for name, value in content.items():
        if (entries := _entries(value)) > _MOST_ENTRIES:
            raise ValueError(f"`{name}` may have up to {_MOST_ENTRIES:,} entries, and has {entries:,}. {_AGAIN}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"`{name}` is a number of {len(str(abs(value)))} digits. {_AGAIN}")
    for name in ("dtype", "torch_dtype"):
        dtype = content.get(name)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            said = repr(content[name])[:60]
            raise ValueError(f"`{name}` should be a type such as 'float32', and is {said}. {_AGAIN}")


def _entries(value: object) -> int:
    """How many values are in a list or dictionary, also in those inside it."""
    count, held = 0, [value]
    while held:
        inner = held.pop()
        if isinstance(inner, list | tuple | dict):
            count += len(inner)
            held += inner.values() if isinstance(inner, dict) else inner
    return count


class CheckedConfig:
    """The part of a config class that reads: with what is wrong named, and nothing of transformers' own errors."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but damage is a `ValueError` that says what to do."""
        with unfit_config_named(pretrained_model_name_or_path):
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in transformers, but damage is a `ValueError` that says what to do."""
        with unfit_config_named(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        """As in transformers, but a config of another family raises `ValueError` instead of taking its defaults."""
        with unfit_config_named(kwargs.get("name_or_path")):
            check_content(config_dict)
            kind = config_dict.get("model_type", cls.model_type)
            if kind != cls.model_type:
                raise ValueError(
                    f"This config holds a {kind}, not a {cls.model_type}. Load it with AutoModel or AutoConfig."
                )
            return super().from_dict(config_dict, **kwargs)
