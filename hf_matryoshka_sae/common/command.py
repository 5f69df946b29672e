"""The frame of a sub-command: how its work ends on the terminal."""

import sys
from collections.abc import Callable

from .logs import is_first_process


def exit_status(
    work: Callable[[], int | None], interrupted: str = "Stopped.", stops: tuple[type[BaseException], ...] = ()
) -> int:
    """Do a command's work and return its exit status; what a user can mend is a line on stderr, no traceback.

    Of several processes only the first says so. Other errors are bugs, and are raised.

    Args:
        work (`Callable[[], int]`): Returns the status, `None` for 0.
        interrupted (`str`, *optional*): Said after Ctrl-C; the status is then 130.
        stops (`tuple` of `type`, *optional*): Exceptions by which the work ends as asked; their text is said.

    Returns:
        `int`: 2 after a `ValueError` or `OSError`.
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
