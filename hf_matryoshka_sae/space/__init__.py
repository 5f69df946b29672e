"""A page on which people prune a dictionary and look at its features; `spaces_app/` is it as a Space.

`page.py` needs Gradio (the extra `space`); nothing above it does.
"""

from .subject.library import Library


__all__ = ["Library", "build_demo", "launch"]


def __getattr__(name: str):
    if name == "build_demo":
        from .page import build_demo

        return build_demo
    if name == "launch":
        from .launching import launch

        return launch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
