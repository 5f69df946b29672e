"""What a docstring says of arguments is what the signature has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[1] / "hf_matryoshka_sae"
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")

Described = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def described(path: Path) -> Iterator[tuple[str, Described]]:
    """Yield functions, classes and their methods of a file by dotted name; not those inside functions."""
    waiting = [("", node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, Described):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            waiting += [(f"{prefix}{node.name}.", inner) for inner in node.body]


def documented(node: Described, section: str) -> set[str]:
    """Return the names in a section of a docstring, without stars.

    An entry is "name (type): text"; several that belong together may share one: "left (type), right (type): text".
    """
    lines = re.search(rf"^{section}:\n((?: +.*\n?|\n)*)", ast.get_docstring(node) or "", re.MULTILINE)
    entries = re.split(r"^ {4}(?=\S)", lines[1] if lines else "", flags=re.MULTILINE)[1:]
    heads = [_without_parentheses(entry).partition(":")[0] for entry in entries]
    return {name.strip(" `*\n") for head in heads for name in head.split(",")}


def _without_parentheses(text: str) -> str:
    innermost = re.compile(r"\([^()]*\)")
    while innermost.search(text):
        text = innermost.sub("", text)
    return text


def arguments(node: Described, is_method: bool) -> tuple[set[str], ast.arguments | None]:
    """Return the names that a function or constructor takes, without stars; for a dataclass its fields."""
    if isinstance(node, ast.ClassDef):
        constructors = [inner for inner in node.body if isinstance(inner, Described) and inner.name == "__init__"]
        if constructors:
            return arguments(constructors[0], is_method=True)
        fields = [inner for inner in node.body if isinstance(inner, ast.AnnAssign)]
        names = {inner.target.id for inner in fields if not ast.unparse(inner.annotation).startswith("ClassVar")}
        return names - {"_"}, None  # `_: KW_ONLY` is no field
    names = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    return names - {"self", "cls"} if is_method else names, node.args


def mistakes(node: Described, is_method: bool) -> tuple[list[str], list[str]]:
    """Return the arguments that an `Args:` section leaves out, and those in it that do not exist."""
    names, (real, spec) = documented(node, "Args"), arguments(node, is_method)
    if not names:
        return [], []
    unknown = names - real - {star.arg for star in (spec.vararg, spec.kwarg) if star} if spec else names - real
    if spec and spec.kwarg:
        unknown = set()  # options that are handed on may be documented by name
    return sorted(real - names - documented(node, "Attributes")), sorted(unknown)


@pytest.mark.parametrize("room", [*ROOMS, ""])
def test_documented_arguments_are_those_of_the_signature(room):
    files = (PACKAGE / room).rglob("*.py") if room else PACKAGE.glob("*.py")
    wrong = [
        f"{path.relative_to(PACKAGE)}: `{name}` leaves out {missing}, documents {unknown}"
        for path in files
        for name, node in described(path)
        for missing, unknown in [mistakes(node, "." in name)]
        if missing or unknown
    ]
    assert not wrong, "\n".join(wrong)


def test_an_argument_left_out_and_one_that_is_gone_are_mistakes():
    docstring = "F.\n\n    Args:\n        a (`int`), b (`int`): A (b): c.\n        e: Gone.\n    "
    function = ast.parse(f"def f(a, b=0, *c, d):\n    {docstring!r}").body[0]
    assert mistakes(function, is_method=False) == (["d"], ["e"])
