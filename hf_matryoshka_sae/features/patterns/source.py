"""The text of a pattern, and errors that point at a place in it."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any


_EXCERPT = 100  # characters of a line in a message, so that a long one does not hide the message


class Source:
    """A pattern behind the lines of its named patterns.

    Args:
        source (`str`): The pattern; its lines may end as on Windows.
        patterns (`dict[str, str]`): Named patterns, one line each.

    Attributes:
        text (`str`): All lines: `name = pattern` for each name, then the pattern.
    """

    def __init__(self, source: str, patterns: Mapping[str, str]) -> None:
        self._heads = [f"{name} = " for name in patterns]
        self._names = list(patterns)
        lines = [f"{name} = {pattern}\n" for name, pattern in patterns.items()]
        self.text = "".join(lines) + source.replace("\r\n", "\n")

    def error(self, message: str, at: int) -> ValueError:
        """Return an error that points at its place, counted in the text of the user: the pattern or a named one."""
        before = self.text[:at]
        line, start = before.count("\n"), before.rfind("\n") + 1
        text, column = self.text[start:].partition("\n")[0], at - start
        if line < len(self._names):
            head = len(self._heads[line])
            place, text, column = f"named {self._names[line]!r}", text[head:], max(0, column - head)
        else:
            place = f"line {line + 1 - len(self._names)}"
        return ValueError(f"Pattern, {place}, column {column + 1}: {message}\n{_pointed_at(text, column)}")


def _pointed_at(text: str, column: int) -> str:
    """Return the line, or an excerpt around the column, with a caret below the column."""
    first = max(0, min(column - _EXCERPT // 2, len(text) - _EXCERPT))
    excerpt, column = text[first : first + _EXCERPT], column - first
    before = "".join("\t" if sign == "\t" else " " * _cells(sign) for sign in excerpt[:column])
    return f"    {excerpt}\n    {before}^"


def _cells(sign: str) -> int:
    """Return the width of a character in a terminal."""
    if unicodedata.combining(sign):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def checked_names(
    names: Any, reserved: Sequence[str], is_name: Callable[[str], object]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Split a dictionary of names into named patterns and named sets of texts.

    Args:
        names (`dict`): A pattern (`str`) or a list of texts, by name.
        reserved (`Sequence[str]`): Names that have a meaning of their own.
        is_name (`Callable`): Returns whether a string is a name.

    Raises:
        `ValueError`: if it is no such dictionary.
    """
    if not isinstance(names, Mapping):
        raise ValueError(f"`names` must be a dictionary of patterns and lists of texts by name, got {names!r:.80}.")
    patterns: dict[str, str] = {}
    sets: dict[str, list[str]] = {}
    for name, value in names.items():
        if not isinstance(name, str) or not is_name(name) or name in reserved:
            raise ValueError(f"Names in patterns are words such as 'vowel' (not {', '.join(reserved)}), got {name!r}.")
        if isinstance(value, str):
            if "\n" in value:
                raise ValueError(f"A named pattern is one line, got {value!r:.80} for {name!r}.")
            patterns[name] = value
        else:
            sets[name] = _texts(name, value)
    return patterns, sets


def _texts(name: str, value: Any) -> list[str]:
    texts = list(value) if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, bytes) else None
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"A name stands for a pattern or a list of texts, got {value!r:.80} for {name!r}.")
    return texts
