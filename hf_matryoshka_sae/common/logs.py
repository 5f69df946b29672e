"""What a command says while it runs: messages of its processes, and progress bars whose loops end at a deadline.

Of messages the first process writes everything, the others warnings.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm


_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)


def is_first_process() -> bool:
    """Return whether this is the first process of a launch, which writes messages that concern all."""
    return os.environ.get("RANK", "0") == "0"


def log_to_stderr() -> None:
    """Log this package's messages to stderr: everything in the first process of a launch, warnings in the others."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is the one to watch
    if not is_first_process():
        transformers_logging.set_verbosity_error()  # all would warn alike of one checkpoint
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_matryoshka_sae").setLevel(logging.INFO if is_first_process() else logging.WARNING)


class OutOfTime(Exception):
    """The deadline of [`within`] is past."""


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Let loops in this block raise [`OutOfTime`] once so many seconds are over; `None` sets no deadline.

    Processes that work together must not set one: each would stop at another place, and the others wait for it.
    """
    token = _DEADLINE.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def check_time() -> None:
    """Raise [`OutOfTime`] if the deadline is past: for long loops without a bar."""
    deadline = _DEADLINE.get()
    if deadline is not None and time.monotonic() > deadline:
        raise OutOfTime


class progress(tqdm):
    """A bar as tqdm's, shown or not, that looks at the deadline before each step."""

    def __iter__(self) -> Iterator[Any]:
        """Yield what is iterated over while there is time."""
        for each in super().__iter__():
            check_time()
            yield each

    def update(self, n: float | None = 1) -> bool | None:
        """Move on by `n` while there is time."""
        check_time()
        return super().update(n)
