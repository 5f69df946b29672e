"""A page on which people prune a dictionary and look at its features; `spaces_app/` is it as a Space."""

from .library import Library
from .page import build_demo, launch


__all__ = ["Library", "build_demo", "launch"]
