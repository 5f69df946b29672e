"""The tree of a token pattern."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Node:
    """A part of a pattern, and where it begins in the source."""

    at: int = field(compare=False, kw_only=True)


@dataclass(frozen=True)
class AnyToken(Node):
    """`.`"""


@dataclass(frozen=True)
class Begin(Node):
    """`[BEGIN]`"""


@dataclass(frozen=True)
class Text(Node):
    """Text, to be tokenised."""

    text: str


@dataclass(frozen=True)
class TokenRegex(Node):
    """One token, by its own text; `regex_at` is where the expression begins in the source."""

    regex: str
    search: bool
    regex_at: int = field(compare=False, kw_only=True)


@dataclass(frozen=True)
class Joined(Node):
    """One part behind the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice(Node):
    """One of several."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat(Node):
    """From `low` to `high` times (`None`: without end)."""

    part: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Capture(Node):
    """`[name=part]`"""

    name: str
    part: Node


@dataclass(frozen=True)
class BackReference(Node):
    """`[name]` after a capture."""

    name: str


@dataclass(frozen=True)
class Look(Node):
    """A look-around."""

    part: Node
    ahead: bool
    negative: bool


@dataclass(frozen=True)
class Prefix(Node):
    """`[prefix part]`"""

    part: Node


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    yield node
    for child in fields(node):
        value = getattr(node, child.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Node):
                yield from walk(part)
