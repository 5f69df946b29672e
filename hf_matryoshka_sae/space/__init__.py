"""A page on which people prune a dictionary and look at its features; `spaces_app/` is it as a Space.

`page.py` needs Gradio (the extra `space`); nothing above it does.
"""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from .launching import launch
    from .page import build_demo
    from .subject.library import Library


__all__ = ["Library", "build_demo", "launch"]

__getattr__, __dir__ = imports_on_use(__name__)
