"""Real text with no download: the documentation that every CPython installation carries.

Three sources, read at run time, none copied into this package:

- the language reference topics behind `help("while")` (`pydoc_data.topics`);
- the docstrings of the standard library, parsed out of its source files, which are never imported;
- the docstrings of the builtins, which have no source file.

One document is one topic, one module docstring, one function, or one class with its documented methods. The text
differs a little between Python versions, so a document is held out by a hash of its *name*: what was held out under
one version stays held out under the next.
"""

import ast
import builtins
import hashlib
import inspect
import os
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal


_HELDOUT_ONE_IN = 20
_MIN_CHARACTERS = 80
# Shorter paragraphs ("Return self.") repeat naturally; longer ones that repeat are copies.
_MIN_COPIED_CHARACTERS = 60
# Tests document themselves, not Python; installed packages and topics are not the standard library's docstrings.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Named = tuple[str, str]  # a document's name, which decides its split, and its text


def embedded_text(split: Literal["train", "heldout"] = "train") -> list[str]:
    """Return English and Python prose that needs no download: two million characters of Python's documentation.

    It is read from the running interpreter's installation, in a deterministic order, and cached in the process. No
    module is imported for it, except `pydoc_data.topics`, which is a dictionary of text.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, or `"heldout"` for the one document in twenty that `train` never contains.

    Returns:
        `list[str]`: The documents, each one topic, module docstring, function, or class with its methods.

    Raises:
        `ValueError`: If `split` is neither of the two.
        `RuntimeError`: If this Python carries no documentation at all.

    Example:
    ```python
    >>> from hf_matryoshka_sae.assets import embedded_text

    >>> train, heldout = embedded_text("train"), embedded_text("heldout")
    ```
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'`split` must be "train" or "heldout", got {split!r}.')
    return [text for name, text in _documents() if _is_heldout(name) == (split == "heldout")]


@lru_cache(maxsize=1)
def _documents() -> tuple[_Named, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = tuple(_without_copies([*_topics(), *_stdlib_documents(root), *_builtin_documents()]))
    if not documents:
        raise RuntimeError(
            f"This Python carries no documentation: expected docstrings in the .py files of {root}, or the module "
            "`pydoc_data.topics`, and found neither. Install the full standard library, or pass your own text."
        )
    return documents


def _is_heldout(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELDOUT_ONE_IN == 0


def _without_copies(documents: Iterable[_Named]) -> Iterator[_Named]:
    """Drop each long paragraph an earlier document has, lest `train` hold a held-out text under another name."""
    seen: set[str] = set()
    for name, text in documents:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                paragraphs.append(paragraph)
            if len(words) >= _MIN_COPIED_CHARACTERS:
                seen.add(words)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= _MIN_CHARACTERS:
            yield name, text


def _topics() -> list[_Named]:
    """Return the language reference, shortest topic first: of a short one inside a long one, the long is cut."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    ordered = sorted(topics.items(), key=lambda item: (len(item[1]), item[0]))
    return [(f"topic {name}", inspect.cleandoc(text)) for name, text in ordered]


def _stdlib_documents(root: Path) -> Iterator[_Named]:
    for path in sorted(_source_files(root)):
        yield from _module_documents(path, _module_name(path.relative_to(root)))


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        # Removed in place, so that installed packages are not even listed.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_documents(path: Path, module: str) -> Iterator[_Named]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # unreadable, or a template that only looks like Python
        return
    if docstring := ast.get_docstring(tree):
        yield module, f"{module}\n\n{docstring}"
    for node in _definitions(tree):
        yield f"{module}.{node.name}", "\n\n".join(_described(node, module))


def _definitions(parent: ast.AST) -> Iterator[_Definition]:
    """Yield classes and functions in `parent`'s own body, also under `if`, `try` and `with`."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _Definition):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(node)


def _described(node: _Definition, scope: str) -> Iterator[str]:
    """Yield one definition as `help` would show it: a heading, the docstring, then each documented method."""
    is_class = isinstance(node, ast.ClassDef)
    name = f"{scope}.{node.name}"
    if docstring := ast.get_docstring(node):
        yield f"class {name}" if is_class else f"{name}({ast.unparse(node.args)})"
        yield docstring
    if is_class:
        for member in _definitions(node):
            yield from _described(member, node.name)


def _builtin_documents() -> Iterator[_Named]:
    for name, value in sorted(vars(builtins).items()):
        # Interactive shells and `site` add objects of their own to this namespace.
        if getattr(value, "__module__", None) == "builtins" and isinstance(value.__doc__, str):
            yield f"builtins.{name}", "\n\n".join(_described_builtin(name, value))


def _described_builtin(name: str, value: object) -> Iterator[str]:
    yield name
    yield inspect.cleandoc(value.__doc__)
    if isinstance(value, type):
        for member, method in sorted(vars(value).items()):
            if not member.startswith("_") and isinstance(method.__doc__, str):
                yield f"{name}.{member}"
                yield inspect.cleandoc(method.__doc__)
