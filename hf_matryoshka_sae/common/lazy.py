"""Packages whose names are imported on first use, so that a command reads its arguments before torch."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def imports_on_use(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__` for names that its `__init__.py` imports under `TYPE_CHECKING`.

    No such name may be that of a submodule, whose import would hide it.

    Args:
        package (`str`): The package's `__name__`.
    """
    module = sys.modules[package]
    sources: dict[str, str] = {}

    def read() -> dict[str, str]:
        if not sources:
            for block in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
                if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                    for line in block.body:
                        source = f"{'.' * line.level}{line.module}"
                        sources.update(dict.fromkeys((alias.name for alias in line.names), source))
        return sources

    def get(name: str) -> Any:
        if name.startswith("__") or name not in read():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(sources[name], package), name)

    def names() -> list[str]:
        return sorted({*vars(module), *read()})

    return get, names
