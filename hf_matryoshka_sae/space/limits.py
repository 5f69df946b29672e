"""What a page open to everybody has to bear: long texts, values of any type, strangers, a GPU lent by the call."""

import functools
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import httpx


MOST_CHARACTERS = 20_000

UNREACHABLE = (OSError, httpx.HTTPError)
"""What the Hub's client raises where something is not there, or the network is not."""


def checked_text(text: str, empty: str = "Write or paste a text first.", most: int = MOST_CHARACTERS) -> str:
    """A text that is there and not too long to be tokenised at once.

    Raises:
        `ValueError`: if it is empty or too long.
    """
    if text is not None and not isinstance(text, str):
        raise ValueError(f"Expected a text, got {text!r:.80} of type {type(text).__name__}.")
    if not text or not text.strip():
        raise ValueError(empty)
    if len(text) > most:
        raise ValueError(
            f"This is {len(text):,} characters long; at most {most:,} can be read here. Paste a part of it."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"This text holds half a character, at place {error.start:,}. Copy it again.") from error
    return text


def wanted() -> bool:
    """Whether the visitor for whom this thread works still waits: has not left the page, nor cancelled.

    Gradio ends neither a thread nor what waits in it; what takes long asks here from time to time.
    """
    if "gradio" not in sys.modules:
        return True
    from gradio.context import LocalContext

    blocks, event = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    if blocks is None or event is None:
        return True
    running = blocks._queue.event_ids_to_events.get(event)  # noqa: SLF001 (there is no other way to ask)
    return running is not None and running.alive


def forget_own_token() -> None:
    """From here on this process asks the Hub as nobody, unless a token is given: strangers do not read with ours."""
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True


def typed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that refuses values of another type than it says, as those of an API may be anything.

    A number without a fraction is a whole number, however it was written. Raises `ValueError`.
    """
    kinds = typing.get_type_hints(method)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            given.arguments[name] = _as(kinds.get(name), name, value)
        return method(*given.args, **given.kwargs)

    return checked


def _as(kind: Any, name: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind is float and number:
        return float(value)
    if kind not in (int, float) and (kind not in (str, bool) or isinstance(value, kind)):
        return value
    wanted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
    raise ValueError(f"`{name}` must be {wanted}, got {value!r:.80}.")


def on_gpu(method: Callable[..., Any] | None = None, *, seconds: int = 60) -> Callable[..., Any]:
    """Runs a method of what has a `library` where a GPU is.

    On a Space with ZeroGPU a GPU is lent for the length of a call, to a process that is a fork of this one: models are
    moved there first, and arguments and results are plain values. Elsewhere the method stays as it is.

    Args:
        method (`Callable`): The method; without one, this returns a decorator.
        seconds (`int`, *optional*, defaults to 60): For which the GPU is lent at most.
    """
    if method is None:
        return functools.partial(on_gpu, seconds=seconds)
    if not os.environ.get("SPACES_ZERO_GPU"):
        return method
    import spaces

    @functools.wraps(method)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.library.renew_locks()  # a thread of the process that was forked may have held one
        self.library.to("cuda")
        return method(self, *args, **kwargs)

    return functools.wraps(method)(spaces.GPU(duration=seconds)(moved))
