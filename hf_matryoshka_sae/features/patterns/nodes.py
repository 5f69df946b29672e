"""The tree of a token pattern."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Node:
    """A part of a pattern; `at` is its place in the source."""

    at: int = field(compare=False, kw_only=True)


@dataclass(frozen=True)
class AnyToken(Node):
    """Any token, `.`."""


@dataclass(frozen=True)
class Begin(Node):
    """The beginning of a text, `[BEGIN]`."""


@dataclass(frozen=True)
class Text(Node):
    """Text that a tokenizer cuts into tokens."""

    text: str


@dataclass(frozen=True)
class TokenRegex(Node):
    """One token whose text matches a regular expression; `regex_at` is the place of the expression in the source."""

    regex: str
    search: bool
    regex_at: int = field(compare=False, kw_only=True)


@dataclass(frozen=True)
class Joined(Node):
    """Parts one behind the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice(Node):
    """One of several parts."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat(Node):
    """A part repeated `low` to `high` times (`None`: any number)."""

    part: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Capture(Node):
    """A capture, `[name=part]`."""

    name: str
    part: Node


@dataclass(frozen=True)
class BackReference(Node):
    """The tokens of an earlier capture, `[name]`."""

    name: str


@dataclass(frozen=True)
class Look(Node):
    """A look-ahead or look-behind."""

    part: Node
    ahead: bool
    negative: bool


@dataclass(frozen=True)
class Prefix(Node):
    """Any beginning of a match of the part, `[prefix part]`."""

    part: Node


def walk(node: Node) -> Iterator[Node]:
    """Yield the node and all nodes below it."""
    yield node
    for child in fields(node):
        value = getattr(node, child.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Node):
                yield from walk(part)
