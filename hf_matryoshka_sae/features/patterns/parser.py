r"""Parse the token-pattern language: from its text to a tree.

    .  (A | B)  A+ A* A? A{2,5}      any token, alternatives, repeats of a group or a bracket
    ` the cat`                       text: the tokens that a tokenizer makes of it; a leading space counts
    [v=A] ... [v]                    what A matched, then the same tokens again
    (?=A) (?!A) (?<=A) (?<!A)        look-arounds
    [re `\d+`]                       one token that this regular expression matches whole; `, search=True`: in part
    [literal_set ` red`, ` blue`]    any of these texts, or of a list given by name
    [prefix A]                       any beginning of a match of A
    [BEGIN]                          the place where a text begins
    name = A                         a line of its own: afterwards [name] stands for A
    # a comment;  \.  \[  \#  \n     a character that would mean something else

The syntax is that of tokre (github.com/noanabeshima/tokre), whose patterns describe latents of SAEs.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

from . import nodes
from .limits import DEEPEST, LONGEST_SOURCE, MOST_PARTS, Sizes
from .source import Source, checked_names


Names = Mapping[str, str | Sequence[str]]

_NAME = re.compile(r"[A-Za-z_]\w*")
_DEFINITION = re.compile(r"\s*([A-Za-z_]\w*)\s*= ?")
_RESERVED = ("BEGIN", "re", "literal_set", "prefix")
_SPECIAL = "()[]|.+*?{#"
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_DEEPEST = 40  # nested brackets, so that no pattern exhausts Python's stack
_MOST = 10_000  # largest bound of a repeat
_MOST_PREFIXED = 500  # parts, each of which is written once for every part before it


def parse(source: str, names: Names | None = None) -> tuple[nodes.Node, Source]:
    """Return the tree of a pattern, and the source that its places refer to: the pattern behind its named patterns.

    Args:
        source (`str`): The pattern, behind any number of lines `name = pattern`.
        names (`dict`, *optional*): More named patterns (`str`), and sets of texts (`list[str]`).

    Raises:
        `ValueError`: if it cannot be read; the message shows the place.
    """
    if not isinstance(source, str):
        raise ValueError(f"A pattern is text, got {type(source).__name__}.")
    patterns, texts = checked_names({} if names is None else names, _RESERVED, _NAME.fullmatch)
    whole = Source(source, patterns)
    if len(whole.text) > LONGEST_SOURCE:
        raise ValueError(
            f"A pattern has at most {LONGEST_SOURCE:,} characters with its names, got {len(whole.text):,}. Give many "
            "texts as a list: `names={'word': [...]}` and [literal_set word]."
        )
    sets: dict[str, nodes.Node] = {
        name: nodes.Choice(tuple(nodes.Text(text, at=0) for text in value), at=0) for name, value in texts.items()
    }
    return _Parser(whole, sets).pattern(), whole


class _Parser:
    """Recursive descent over the characters of one source."""

    def __init__(self, whole: Source, names: dict[str, nodes.Node]) -> None:
        self.whole, self.source, self.names = whole, whole.text, names
        self.at, self.end, self.depth = 0, len(self.source), 0
        self.captured: set[str] = set()
        self.open: list[str] = []  # captures that are being read
        self.sizes = Sizes()

    def error(self, message: str, at: int | None = None) -> ValueError:
        return self.whole.error(message, self.at if at is None else at)

    def checked(self, node: nodes.Node) -> nodes.Node:
        """Return a part; raise an error if it is too large."""
        size = self.sizes.of(node)
        if size.parts > MOST_PARTS:
            raise self.error("with its names written out, the pattern is too long.")
        if size.depth > DEEPEST:
            raise self.error("the pattern's names are nested too deep. Write it with fewer.")
        return node

    # Lines

    def pattern(self) -> nodes.Node:
        """Read the named patterns, then the pattern."""
        tree = None
        for start, stop in self._lines():
            definition = _DEFINITION.match(self.source, start, stop)
            if tree is not None:
                raise self.error("the pattern stands alone on the last line; the line before is one already.", start)
            self.captured = set()
            if definition is None:
                tree = self._range(start, stop)
                continue
            name = definition[1]
            if name in _RESERVED:
                raise self.error(f"'{name}' has a meaning of its own; choose another name.", start)
            self.names[name] = self._range(definition.end(), stop)
        if tree is None:
            hint = "Lines `name = pattern` only name patterns (write `\\=` for the character)." if self.names else ""
            raise self.error(f"there is no pattern. {hint}".rstrip(), len(self.source))
        return tree

    def _lines(self) -> Iterator[tuple[int, int]]:
        """Yield begin and end of each line that is not empty, without its comment."""
        start = 0
        for line in self.source.split("\n"):
            stop = start + _comment_at(line)
            if self.source[start:stop].strip():
                yield start, stop
            start += len(line) + 1

    def _range(self, start: int, stop: int) -> nodes.Node:
        self.at, self.end = start, stop
        node = self.choice(closing="")
        if self.at < self.end:
            sign = self.source[self.at]
            raise self.error(f"'{sign}' closes nothing. Write `\\{sign}` for the character.")
        return self.checked(node)

    # Parts

    def choice(self, closing: str) -> nodes.Node:
        """Read alternatives, up to a closing bracket or the end."""
        start = self.at
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.error(f"brackets are nested more than {_DEEPEST} deep. Name the inner ones.")
        parts = [self.joined()]
        while self._peek() == "|":
            self.at += 1
            parts.append(self.joined())
        self.depth -= 1
        if closing and self._peek() != closing:
            raise self.error(f"'{closing}' is missing here.")
        self.at += len(closing)
        return parts[0] if len(parts) == 1 else self.checked(nodes.Choice(tuple(parts), at=start))

    def joined(self) -> nodes.Node:
        start, parts = self.at, []
        known = 0  # size of these parts
        before = ""  # the sign with which the last part began; empty for text
        while (sign := self._peek()) and sign not in "|)]":
            if sign in "+*?{":
                self._repeat(parts, before)
            elif sign == "(":
                parts.append(self._group())
            elif sign == "[":
                parts.append(self._bracket())
            elif sign == ".":
                parts.append(nodes.AnyToken(at=self.at))
                self.at += 1
            elif sign == "#":  # no comment: a backtick before it opened a quotation
                raise self.error("a '#' stands behind an open backtick. Write `\\#`, or close the backtick.")
            else:
                parts, sign = parts + self._text(), ""
            before = sign
            # Checked here, not at the end: named patterns may be large, and later steps walk through them.
            known += self.sizes.of(parts[-1]).parts if parts else 0
            if known > MOST_PARTS:
                raise self.error("with its names written out, the pattern is too long.", start)
        if not parts:
            raise self.error("expected a pattern, there is nothing. `(A)?` makes A optional.", start)
        return parts[0] if len(parts) == 1 else self.checked(nodes.Joined(tuple(parts), at=start))

    def _text(self) -> list[nodes.Node]:
        """Read text up to the next sign; spaces at its end are for the eye alone."""
        start, text, length = self.at, "", 0
        while (sign := self._peek()) and sign not in _SPECIAL:
            self.at += 1
            if sign == "\\":
                escaped = self._peek()
                if not escaped:
                    raise self.error("a backslash escapes the character behind it, and there is none.", self.at - 1)
                self.at += 1
                text += _ESCAPES.get(escaped, escaped)
                length = len(text)
            else:
                text += sign
                length = length if sign == " " else len(text)
        return [nodes.Text(text[:length], at=start)] if length else []

    def _repeat(self, parts: list[nodes.Node], before: str) -> None:
        start, sign = self.at, self._peek()
        self.at += 1
        if sign == "{":
            low, high = self._bounds(start)
        else:
            low, high = {"+": (1, None), "*": (0, None), "?": (0, 1)}[sign]
        last = parts[-1] if parts else None
        if last is None or isinstance(last, (nodes.Look, nodes.Begin)):
            raise self.error(f"'{sign}' has nothing before it to repeat. Write `\\{sign}` for the character.", start)
        if not before:
            raise self.error(
                f"'{sign}' behind text is unclear: write `(text){sign}` to repeat it, `\\{sign}` for the character.",
                start,
            )
        if before in "+*?{":
            raise self.error(
                f"'{sign}' follows a repeat. Every match counts, long or short, so there are no lazy repeats; "
                "put the first in parentheses to repeat it.",
                start,
            )
        parts[-1] = self.checked(nodes.Repeat(last, low, high, at=last.at))

    def _bounds(self, start: int) -> tuple[int, int | None]:
        bounds = re.compile(r"(\d*)(,?)(\d*)\}").match(self.source, self.at, self.end)
        if bounds is None or not (bounds[1] or bounds[3]):
            raise self.error("expected {2}, {2,}, {,5} or {2,5}. Write `\\{` for the character.", start)
        self.at = bounds.end()
        if max(len(bounds[1]), len(bounds[3])) > 9:
            raise self.error(f"repeats go to {_MOST}.", start)
        low = int(bounds[1] or 0)
        high = low if not bounds[2] else int(bounds[3]) if bounds[3] else None
        if max(low, high or 0) > _MOST or (high is not None and low > high) or high == 0:
            raise self.error(f"expected bounds from small to large, at most {_MOST}, got {bounds[0][:-1]}.", start)
        return low, high

    def _group(self) -> nodes.Node:
        start = self.at
        for opening in ("(?<=", "(?<!", "(?=", "(?!"):
            if self.source.startswith(opening, start):
                return self._look(opening)
        self.at += 1
        if self._peek() == "?":
            raise self.error("expected (?=A), (?!A), (?<=A) or (?<!A) behind '(?'.")
        return self.choice(closing=")")

    def _look(self, opening: str) -> nodes.Node:
        start, before = self.at, set(self.captured)
        self.at += len(opening)
        part = self.choice(closing=")")
        ahead, negative = "<" not in opening, "!" in opening
        if negative:
            self.captured = before  # a part that must not match captures nothing
        inside = list(nodes.walk(part))
        captures = {node.name for node in inside if isinstance(node, nodes.Capture)}
        if not ahead and any(isinstance(node, nodes.BackReference) and node.name in captures for node in inside):
            raise self.error(
                "a look-behind is matched from its end, so it cannot repeat what it captures itself. Write the part "
                "before the token in the pattern itself: the mask is at the end of a match anyway.",
                start,
            )
        return self.checked(nodes.Look(part, ahead, negative, at=start))

    # Brackets

    def _bracket(self) -> nodes.Node:
        start = self.at
        self.at += 1
        match = _NAME.match(self.source, self.at, self.end)
        if match is None:
            raise self.error(
                "expected [name], [name=pattern], [re `...`], [literal_set ...], [prefix ...] or [BEGIN]. "
                "Write `\\[` for the character.",
                start,
            )
        name = match[0]
        self.at = match.end()
        if name == "re":
            return self._token_regex(start)
        if name == "literal_set":
            return self._literal_set(start)
        if name == "prefix":
            return self._prefix(start)
        if self._peek() == "=" and name not in _RESERVED:
            self.at += 1
            return self._capture(name, start)
        if self._peek() != "]":
            raise self.error(f"expected ']' or '=' behind '{name}'.")
        self.at += 1
        return nodes.Begin(at=start) if name == "BEGIN" else self._reference(name, start)

    def _capture(self, name: str, start: int) -> nodes.Node:
        if name in self.names:
            raise self.error(f"'{name}' is a named pattern already; capture under another name.", start)
        self.open.append(name)
        part = self.choice(closing="]")
        self.open.pop()
        if name in self.open or name in self.sizes.of(part).captures:
            raise self.error(f"'{name}' is captured within its own capture; name one of them otherwise.", start)
        self.captured.add(name)
        return self.checked(nodes.Capture(name, part, at=start))

    def _reference(self, name: str, start: int) -> nodes.Node:
        if name in self.open:
            raise self.error(f"[{name}] stands within [{name}=...], which has not ended there.", start)
        if name in self.captured:
            return nodes.BackReference(name, at=start)
        if name not in self.names:
            known = sorted({*self.names, *self.captured, *_RESERVED})
            near = difflib.get_close_matches(name, known, n=1) or known
            raise self.error(f"nothing is named '{name}' before this. Perhaps {', '.join(near)}?", start)
        node = self.names[name]
        self.captured |= self.sizes.of(node).captures
        return node

    def _prefix(self, start: int) -> nodes.Node:
        if self._peek() == " ":
            self.at += 1
        part = self.choice(closing="]")
        if any(isinstance(node, (nodes.Capture, nodes.Look, nodes.Prefix)) for node in nodes.walk(part)):
            raise self.error("[prefix A] takes no captures, look-arounds or other prefixes inside.", start)
        if self.sizes.of(part).parts > _MOST_PREFIXED:
            raise self.error(f"[prefix ...] takes up to {_MOST_PREFIXED} parts. Leave the rest behind it.", start)
        return self.checked(nodes.Prefix(part, at=start))

    def _token_regex(self, start: int) -> nodes.Node:
        regex, regex_at = self._quoted("[re `\\d+`]")
        option = re.compile(r"\s*(?:,\s*search\s*=\s*(\w+)\s*)?\]").match(self.source, self.at, self.end)
        if option is None or option[1] not in (None, "True", "False"):
            raise self.error("expected `]`, `, search=True]` or `, search=False]` here.")
        self.at = option.end()
        return nodes.TokenRegex(regex, option[1] == "True", at=start, regex_at=regex_at)

    def _literal_set(self, start: int) -> nodes.Node:
        reference = re.compile(r"\s+([A-Za-z_]\w*)\]").match(self.source, self.at, self.end)
        if reference is not None:
            self.at = reference.end()
            return self._reference(reference[1], start)
        texts = [self._quoted("[literal_set ` red`, ` blue`]")]
        while more := re.compile(r"\s*,").match(self.source, self.at, self.end):
            self.at = more.end()
            texts.append(self._quoted("[literal_set ` red`, ` blue`]"))
        if self._peek() != "]":
            raise self.error("expected ',' or ']' behind a text in backticks.")
        self.at += 1
        return self.checked(nodes.Choice(tuple(nodes.Text(text, at=at) for text, at in texts), at=start))

    def _quoted(self, example: str) -> tuple[str, int]:
        """Read text in backticks; return it with its place."""
        match = re.compile(r"\s*`([^`]+)`").match(self.source, self.at, self.end)
        if match is None:
            raise self.error(f"expected something in backticks, as in {example}.")
        self.at = match.end()
        return match[1], match.start(1)

    def _peek(self) -> str:
        return self.source[self.at] if self.at < self.end else ""


def _comment_at(line: str) -> int:
    """Return the place where a line's comment begins; the line's length where there is none."""
    quoted = False
    at = 0
    while at < len(line):
        if line[at] == "`":
            quoted = not quoted
        elif line[at] == "\\" and not quoted:
            at += 1
        elif line[at] == "#" and not quoted:
            return at
        at += 1
    return len(line)
