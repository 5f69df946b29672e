"""Estimate the size of a pattern, before anything is done with it that could take too long or too much memory.

The `regex` library stops a search in time, but not its own compiling, which copies what is repeated: `a{1000000000}`
is a billion copies, and each `+` around a `+` doubles what is inside. So the size with all copies is estimated first.
"""

import re
from dataclasses import dataclass, fields

from .nodes import Capture, Node


LONGEST_SOURCE = 100_000  # characters of a pattern and its named patterns
MOST_PARTS = 20_000  # parts of a pattern, with every name replaced by its pattern
DEEPEST = 100  # nesting of parts, so that no pattern exhausts Python's stack
LONGEST_REGEX = 10_000  # characters of a regular expression for tokens
MOST_COPIES = 1_000_000  # characters of an expression with its repeats written out
_MOST_TIMES = 1000  # largest bound of a repeat in a regular expression for tokens
_DEEPEST_GROUPS = 100

_PIECE = re.compile(
    r"(?P<comment>\(\?#[^)]*\))"
    r"|(?P<open>\((?:\?(?:[:=!>|]|<[=!]|P?<\w+>)?)?)"
    r"|(?P<close>\))"
    r"|(?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d+)\})[?+]?)"
    r"|(?P<atom>\\[\s\S]|\[\^?\]?(?:\\[\s\S]|[^\]\\])*\]|[\s\S])"
)
# How the `regex` library asks for matches with errors, which can take seconds a token: (?:word){e<=2}, (?e), (?b).
# Comments, named characters, escapes and sets come first, as braces in them mean nothing.
_FUZZY = re.compile(
    r"\(\?#[^)]*\)|\\[pPN]\{[^}]*\}|\\[\s\S]|\[\^?\]?(?:\\[\s\S]|[^\]\\])*\]"
    r"|(?P<fuzzy>\{[^{}]*[eids][^{}]*\}?|\(\?[a-zA-Z]*[eb][a-zA-Z]*(?:-[a-zA-Z]+)?[:)])"
)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Size:
    """Size of a part of a pattern, with every name replaced by its pattern.

    Args:
        parts (`int`): Number of parts in it, itself included.
        depth (`int`): Depth to which they are nested.
        captures (`frozenset[str]`): Names that are captured in it.
    """

    parts: int
    depth: int
    captures: frozenset[str]


class Sizes:
    """Sizes of parts, each computed once: a named pattern is the same part wherever its name stands."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Node, Size]] = {}  # by identity: to compare parts would walk through them

    def of(self, node: Node) -> Size:
        """Return the size of a part; sizes of the parts inside are known from earlier calls."""
        if id(node) not in self._known:
            self._known[id(node)] = node, self._computed(node)
        return self._known[id(node)][1]

    def _computed(self, node: Node) -> Size:
        inside = []
        for each in fields(node):
            value = getattr(node, each.name)
            inside += [self.of(part) for part in (value if isinstance(value, tuple) else (value,)) if _is_part(part)]
        own = {node.name} if isinstance(node, Capture) else set()
        return Size(
            1 + sum(size.parts for size in inside),
            1 + max((size.depth for size in inside), default=0),
            frozenset(own.union(*(size.captures for size in inside))),
        )


def _is_part(value: object) -> bool:
    return isinstance(value, Node)


def check_token_regex(expression: str) -> None:
    """Raise `ValueError` for a regular expression that would be too large to compile."""
    if len(expression) > LONGEST_REGEX:
        raise ValueError(f"a regular expression has at most {LONGEST_REGEX:,} characters, got {len(expression):,}.")
    if re.search(r"\(\?[\w-]*x", expression):
        raise ValueError("regular expressions for tokens take no (?x); write it without spaces and comments.")
    fuzzy = next((piece for piece in _FUZZY.finditer(expression) if piece["fuzzy"]), None)
    if fuzzy is not None:
        raise ValueError(
            f"regular expressions for tokens match exactly, so {fuzzy['fuzzy'][:20]} is not allowed. Write `\\{{` for "
            "a brace, or alternatives as (a|b)."
        )
    for repeat in re.finditer(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}", expression):
        if any(len(number) > 9 or int(number or 0) > _MOST_TIMES for number in repeat.groups()):
            raise ValueError(f"repeats in a regular expression go to {_MOST_TIMES}, got {repeat[0][:20]}.")
    check_copies(expression)


def check_copies(expression: str) -> None:
    """Raise `ValueError` for an expression that is too large with its repeats written out."""
    copies, depth = _written_out(expression)
    if copies > MOST_COPIES:
        raise ValueError("with its repeats written out it is too long. Repeat less, and no repeats inside repeats.")
    if depth > _DEEPEST_GROUPS:
        raise ValueError(f"its groups are nested more than {_DEEPEST_GROUPS} deep. Nest less.")


def _written_out(expression: str) -> tuple[int, int]:
    """Estimate the number of characters of an expression with its repeats written out, and how deep its groups are."""
    outer: list[int] = []
    total = last = deepest = 0  # of the current group: characters so far, and of the last atom, which may be repeated
    for piece in _PIECE.finditer(expression):
        kind = piece.lastgroup
        if kind == "repeat":
            last *= _times(piece[0])
        elif kind == "open":
            outer.append(total + last)
            total = last = 0
            deepest = max(deepest, len(outer))
        elif kind == "close":
            group = total + last + 1
            total, last = (outer.pop() if outer else 0), group
        elif kind == "atom":
            total, last = total + last, len(piece[0])
    return sum(outer) + total + last, deepest


def _times(repeat: str) -> int:
    """Return the number of copies that a repeat makes: its lower bound, and one more where it may match more."""
    if repeat[0] != "{":
        return 2 if repeat[0] == "+" else 1
    numbers = _NUMBER.findall(repeat)
    if max(map(len, numbers)) > 9:
        return MOST_COPIES
    least = 0 if repeat.startswith("{,") else int(numbers[0])
    exact = "," not in repeat or (len(numbers) == 2 and numbers[0] == numbers[1])
    return max(1, least + (not exact))
