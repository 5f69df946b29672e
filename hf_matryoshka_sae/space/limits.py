"""What a page open to everybody has to bear: long texts, and a GPU that is lent by the call."""

import functools
import os
from collections.abc import Callable
from typing import Any


MOST_CHARACTERS = 20_000


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


def on_gpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a method of [`Endpoints`] where a GPU is.

    On a Space with ZeroGPU a GPU is lent for the length of a call, to a process that is a fork of this one: models are
    moved there first, and arguments and results are plain values. Elsewhere the method stays as it is.
    """
    if not os.environ.get("SPACES_ZERO_GPU"):
        return method
    import spaces

    @functools.wraps(method)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.library.to("cuda")
        return method(self, *args, **kwargs)

    return functools.wraps(method)(spaces.GPU(duration=60)(moved))
