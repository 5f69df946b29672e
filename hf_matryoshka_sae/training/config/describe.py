"""What the fields of config dataclasses are: name, type, default and meaning, for `--help` and the reference page.

A field's meaning is the docstring right under it, and a comment on a line of its own is the heading of the fields
below it. Both are read from the source, where alone they are written.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from .presets import defaults_for
from .run import RunConfig
from .spec import FAMILIES, SAESpec


MOST_USED = (
    "model",
    "dataset.path",
    "hookpoints",
    "context_length",
    "tokens",
    "batch_size",
    "saes.0.type",
    "saes.0.num_latents",
    "saes.0.k",
    "saes.0.activation",
    "saes.0.prefix_widths",
    "saes.0.target_l0",
    "saes.0.preset",
    "saes.0.lr",
    "output_dir",
    "checkpoint_every",
    "resume",
    "mixed_precision",
    "trackers",
    "seed",
)
"""The fields that come first."""


@dataclass(frozen=True)
class FieldText:
    """A field for readers; `name` is that of its flag."""

    name: str
    group: str
    type: str
    default: str
    meaning: str


def run_fields() -> list[FieldText]:
    """All fields of a run, the most used first."""
    fields = {field.name: field for field in described(RunConfig)}
    first = [dataclasses.replace(fields.pop(name), group="Used most") for name in MOST_USED]
    return first + list(fields.values())


def described(cls: type, prefix: str = "", about: str = "") -> list[FieldText]:
    """The fields of a config dataclass, those of dataclasses in it after its own.

    Args:
        cls (`type`): The dataclass.
        prefix (`str`, *optional*): What stands before the names in flags, such as `saes.0.`.
        about (`str`, *optional*): What stands before the headings, such as `Entry of saes`.
    """
    hints, texts, group, inner = typing.get_type_hints(cls), [], about, {}
    for node, heading, meaning in _source_of_fields(cls):
        name, kind = node.target.id, _type_text(node.annotation)
        group = ": ".join(part for part in (about, heading) if part) if heading else group
        nested = next((part for part in (hints[name], *typing.get_args(hints[name])) if is_dataclass(part)), None)
        if nested in inner:
            kind = f"fields as of {inner[nested]}"
        elif nested is not None:
            inner[nested], kind = prefix + name, "list of entries" if kind.startswith("list") else "fields"
        texts.append(FieldText(prefix + name, group, kind, _default_text(cls, name), meaning))
    for nested, name in inner.items():
        entries = typing.get_origin(hints[name.removeprefix(prefix)]) is list
        texts += described(nested, f"{name}.{'0.' if entries else ''}", f"{'Entry of ' if entries else ''}{name}")
    return texts


def help_text(fields: Sequence[FieldText], width: int = 100) -> str:
    """Fields as the text of a `--help`, by group."""
    lines, group = [], None
    for field in fields:
        if field.group != group:
            group = field.group
            lines += ["", f"{group}:"] if group else [""]
        lines.append(f"  --{field.name}  {field.type}{f', {field.default}' if field.default else ''}")
        lines += textwrap.wrap(field.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def markdown(fields: Sequence[FieldText]) -> str:
    """Fields as tables, by group."""
    lines, group = [], None
    for field in fields:
        if field.group != group:
            group = field.group
            lines += ["", f"### {group}", ""] if group else [""]
            lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{field.name}`", field.type, field.default.removeprefix("default "), field.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines[1:]) + "\n"


def _source_of_fields(cls: type) -> Iterator[tuple[ast.AnnAssign, str, str]]:
    """Each field's statement, the heading right above it if there is one, and its meaning on one line."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, body = source.splitlines(), ast.parse(source).body[0].body
    for before, node, after in zip([body[0], *body], body, [*body[1:], None], strict=False):
        if not isinstance(node, ast.AnnAssign):
            continue
        above = lines[before.end_lineno : node.lineno - 1]
        heading = [line.strip("# ") for line in above if line.strip().startswith("#")]
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        yield node, " ".join(heading), " ".join(after.value.value.split()) if is_text else ""


_WORDS = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "dict": "fields"}


def _type_text(annotation: ast.expr) -> str:
    """An annotation in words: `int | None` is `whole number`, and `Literal["a", "b"] | None` is `a or b`."""
    if isinstance(annotation, ast.BinOp):
        sides = [_type_text(side) for side in (annotation.left, annotation.right)]
        if sides == ["whole number", "number"]:
            return "number"
        return " or ".join(side for side in sides if side != "None")
    if isinstance(annotation, ast.Subscript) and annotation.value.id == "list":
        return f"list of {_type_text(annotation.slice)}s"
    if isinstance(annotation, ast.Subscript):
        *names, last = (str(name.value) for name in annotation.slice.elts)
        return f"{', '.join(names)} or {last}"
    text = ast.unparse(annotation)
    return _WORDS.get(text, text)


def _default_text(cls: type, name: str) -> str:
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return "required"
    values = [] if default is None else [_value_text(default)]
    families: dict[str, list[str]] = {}
    for family in FAMILIES if cls is SAESpec else ():
        own = defaults_for({"type": family}).get(name, default)
        if own != default:
            families.setdefault(_value_text(own), []).append(family)
    values += [f"{value} for {', '.join(names)}" for value, names in families.items()]
    return f"default {'; '.join(values)}" if values else ""


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    return str(value)
