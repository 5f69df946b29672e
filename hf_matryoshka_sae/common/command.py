"""The frame of a sub-command: its exit status, and errors as one line on the terminal."""

import sys
from collections.abc import Callable

from .logs import is_first_process


def exit_status(
    work: Callable[[], int | None], interrupted: str = "Stopped.", stops: tuple[type[BaseException], ...] = ()
) -> int:
    """Do a command's work and return its exit status; an error that a user can mend is a line on stderr.

    Of several processes only the first writes it. Other errors are bugs, and are raised.

    Args:
        work (`Callable[[], int]`): Returns the status, `None` for 0.
        interrupted (`str`, *optional*): Message after Ctrl-C; the status is then 130.
        stops (`tuple` of `type`, *optional*): Exceptions that end the work like Ctrl-C; their text is the message.

    Returns:
        `int`: The status of `work`; 2 after a `ValueError` or `OSError`, 130 after an interruption.
    """
    try:
        return work() or 0
    except (KeyboardInterrupt, *stops) as stopped:
        message, status = str(stopped) or interrupted, 130
    except (ValueError, OSError) as error:
        message, status = f"error: {error}", 2
    if is_first_process():
        sys.stderr.write(f"\n{message}\n")
    return status
