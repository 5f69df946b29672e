"""Dataclasses from nested dicts, strictly: an unknown field or a wrong type is an error that names the nearest."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ...common.command import nearest


T = TypeVar("T")


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """An instance of the dataclass `cls` from nested dicts and lists.

    Args:
        cls (`type`): A dataclass; its annotations say what is allowed.
        data (`dict`): Field names and values.
        where (`str`, *optional*): Prefix of field names in messages.

    Raises:
        `ValueError`: for an unknown field, a missing one, or a value of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"`{where.rstrip('.') or cls.__name__}` must hold fields, got {data!r}.")
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            raise ValueError(f"Unknown field `{where}{name}`.{nearest(str(name), hints)}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in data
    ]
    if missing:
        raise ValueError(
            f"Missing field{'s' * (len(missing) > 1)}: {', '.join(f'`{where}{name}`' for name in missing)}."
        )
    values = {name: _value(hints[name], value, where + name) for name, value in data.items()}
    with errors_named(where.rstrip(".")):
        return cls(**values)


@contextmanager
def errors_named(where: str) -> Iterator[None]:
    """Say of a `ValueError` which entry it is about, such as `saes.0`, where its text does not."""
    try:
        yield
    except ValueError as error:
        if where in str(error):
            raise
        raise ValueError(f"`{where}`: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks for it; numbers written as `1e-3` or `1_000` are strings to YAML 1.1."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _first_that_fits(typing.get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where + ".")
    if typing.get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{where}` must be a list, got {value!r}.")
        (item,) = typing.get_args(hint)
        return [_value(item, entry, f"{where}.{i}") for i, entry in enumerate(value)]
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"`{where}` is {value!r}.{nearest(str(value), map(str, typing.get_args(hint)))}")
        return value
    return _scalar(hint, value, where)


def _first_that_fits(options: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = [option for option in options if option is not type(None)]
    errors = []
    for option in options:
        try:
            return _value(option, value, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _scalar(hint: type, value: Any, where: str) -> Any:
    if isinstance(value, str) and hint in (int, float):
        with suppress(ValueError):
            value = float(value.replace("_", "")) if hint is float else int(float(value.replace("_", "")))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ValueError(f"`{where}` must be of type {hint.__name__}, got {value!r}.")
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields in a YAML file. Raises `ValueError` where it is missing, no YAML, or holds no fields."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no config file {path}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold fields such as `model:`, got {type(data).__name__}.")
    return data


def override(data: dict, flags: list[str]) -> dict:
    """Apply command-line flags such as `--batch_size 4096`, `--dataset.column=body` or `--saes.0.k 64` to `data`.

    Raises:
        `ValueError`: for a flag without a value, or a path through something that has no fields.
    """
    pending = list(flags)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"Expected a flag such as --batch_size 4096, got {flag!r}.")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise ValueError(f"Flag --{name} needs a value, for example --{name}=VALUE.")
            text = pending.pop(0)
        _assign(data, name.replace("-", "_").split("."), yaml.safe_load(text), name)
    return data


def _assign(target: Any, path: list[str], value: Any, name: str) -> None:
    for here, key in enumerate(path):
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                raise ValueError(f"--{name}: {key!r} is no position in a list of {len(target)}.")
            key = int(key)
        elif not isinstance(target, dict):
            raise ValueError(f"--{name}: `{'.'.join(path[:here])}` has no fields.")
        if here == len(path) - 1:
            target[key] = value
        else:
            target = target.setdefault(key, {}) if isinstance(target, dict) else target[key]
