"""What went wrong, as the page says it."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from ..limits import UNREACHABLE


def shows_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler, also one that yields, whose `ValueError` or failure to reach the Hub the visitor reads as a message.

    Their text is written for people, and says what to do; any other error is a fault of ours and stays one.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def shown_generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with _as_message():
                yield from handler(*args, **kwargs)

        return shown_generator

    @functools.wraps(handler)
    def shown_handler(*args: Any, **kwargs: Any) -> Any:
        with _as_message():
            return handler(*args, **kwargs)

    return shown_handler


@contextmanager
def _as_message() -> Iterator[None]:
    try:
        yield
    except (ValueError, *UNREACHABLE) as error:
        raise gr.Error(plain(str(error) or type(error).__name__), print_exception=False) from error


def plain(text: str) -> str:
    """A message that quotes what a visitor or a link said, as text: messages are shown as HTML."""
    return escape(text, quote=False)


def warn(text: str) -> None:
    """Tell the visitor something."""
    gr.Warning(plain(text))
