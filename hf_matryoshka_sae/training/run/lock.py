"""A lock on a run's folder, held for the run's life, so that two runs never write to one folder."""

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from filelock import FileLock, Timeout

from ...common.files import write_json


logger = logging.getLogger(__name__)

_LOCK = ".run.lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}

T = TypeVar("T")


def in_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call `work` in the main process; what it returns or raises is returned or raised in all processes.

    Args:
        accelerator (`Accelerator`): Owns the processes.
        work (`Callable`): Returns something that can be pickled; of errors, `ValueError` and `OSError` are passed on.
    """
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [(work(), None)]
        except (ValueError, OSError) as error:
            outcome = [(None, error)]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(outcome, 0)
    result, error = outcome[0]
    if error is not None:
        error.on_all_processes = True  # so that no process tells it to the others again
        raise error
    return result


class RunLock:
    """The lock of a run's folder. It ends with the process that holds it, however that ends.

    The lock is the operating system's, on `.run.lock`; `.run.lock.json` says who holds it. Where the file system has
    none, filelock takes its own kind (a file that is there while the run is); where it has no such kind either, a
    warning is given and nothing is locked.

    Args:
        folder (`Path`): The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.held = folder, False
        self._lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)
        self._owner = folder / f"{_LOCK}.json"

    def acquire(self) -> None:
        """Make the folder and lock it.

        Raises:
            `ValueError`: if another process holds the lock; says which.
            `OSError`: if the folder cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.held = self._try()
            if self.held:
                since = time.strftime("%Y-%m-%d %H:%M:%S %z")
                write_json(self._owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        except OSError as error:
            self.release()
            if isinstance(error, Timeout):  # which is an OSError
                raise ValueError(self._taken()) from error
            raise OSError(
                f"`output_dir` {self.folder} cannot be written to: {error}. Free or mount it, or give another."
            ) from error

    def _try(self) -> bool:
        """Whether the lock is held now: not where the file system has none. Raises `Timeout` if another has it."""
        try:
            self._lock.acquire()
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                f"The file system of {self.folder} has no locks ({error}): nothing keeps a second run out of this "
                "folder, so start none."
            )
            return False
        return True

    def _taken(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "a process that has not said which"
        return (
            f"{self.folder} is in use by another run ({who}). Wait until it has ended, or give another `output_dir`. "
            f"If no such process is left, delete {self.folder / _LOCK}."
        )

    def release(self) -> None:
        """Let go of the folder, if it is held."""
        if self.held:
            with contextlib.suppress(OSError):  # a folder that is gone, or read-only by now
                self._owner.unlink()
            self._lock.release()
        self.held = False
