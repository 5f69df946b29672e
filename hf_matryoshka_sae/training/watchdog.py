"""A run of several processes ends everywhere, and says why, when one of them does.

Left alone, the others would wait for it: gloo notices a closed connection, NCCL only a timeout, which must be hours
long because some work takes hours. Here every process watches the next one through a small store of their own.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator


logger = logging.getLogger(__name__)

_EVERY = 1.0  # seconds between looks
_SILENT = 40.0  # seconds after which a process on another machine counts as gone
_GRACE = 8.0  # seconds in which a process may end by itself


class LostProcess(RuntimeError):
    """Another process of the run has ended."""


class _Terminated(SystemExit):
    """The process was asked to end."""


def _leave(number, frame):
    raise _Terminated(128 + number)


class Watchdog:
    """Watches the processes of a run for the time of a `with` block.

    A process on the same machine is gone when its number is; one elsewhere when it has been silent for 40 seconds. All
    that are left then end within ten more, whatever they are waiting for, with a message on stderr and status 1. An
    error that one process raises is told to all.

    Args:
        accelerator (`Accelerator`): Owns the processes; with one, nothing is done.
        folder (`Path`): The run's, for the message.

    Raises:
        [`LostProcess`]: in place of the error that the loss of another process has led to in this one.
    """

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.rank, self.world, self.folder = accelerator.process_index, accelerator.num_processes, folder
        self._reason: str | None = None
        self._ended = threading.Event()
        self._found = threading.Event()
        self._thread: threading.Thread | None = None
        self._before = None  # what SIGTERM did

    def __enter__(self) -> "Watchdog":
        if self.world > 1:
            if threading.current_thread() is threading.main_thread():
                self._before = signal.signal(signal.SIGTERM, _leave)
            try:
                self._store = self._open_store()
                here = {"host": socket.gethostname(), "pid": os.getpid()}
                self._store.set(f"who/{self.rank}", json.dumps(here))
                self._next = (self.rank + 1) % self.world
                self._watched = json.loads(self._store.get(f"who/{self._next}"))
            except RuntimeError as error:  # a network that lets only some ports through, say
                logger.warning(
                    f"Processes cannot watch each other ({error}): if one dies, the others may wait for it."
                )
                return self
            self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def _open_store(self) -> dist.TCPStore:
        """A store of the run's own: torch's is busy while a process waits for another."""
        address, store, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), None, timedelta(seconds=60)
        told = [None]
        if self.rank == 0:
            store = dist.TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            told = [store.port]
        dist.broadcast_object_list(told, 0)
        return store or dist.TCPStore(address, told[0], is_master=False, timeout=timeout, wait_for_workers=False)

    def __exit__(self, kind, error, traceback) -> None:
        if self._before is not None:
            # A launcher that has lost a process asks the others to end at once; why, they are about to say.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self._close(error)
        finally:
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._before)

    def _close(self, error: BaseException | None) -> None:
        if self._thread is None:
            return
        consequence = isinstance(error, RuntimeError | _Terminated)
        if consequence:
            self._found.wait(_GRACE)
        self._ended.set()
        self._thread.join(2 * _EVERY)
        if consequence and self._reason is not None:
            raise LostProcess(self._reason) from error
        try:
            if error is not None and isinstance(error, Exception) and not getattr(error, "on_all_processes", False):
                self._store.set("failed", f"Process {self.rank} of {self.world} failed: {error}")
                time.sleep(2 * _EVERY)  # the store is this process's own where its rank is 0
            self._store.set(f"done/{self.rank}", "1")
        except RuntimeError:  # the store's process has ended
            pass

    def _work(self) -> None:
        heard, at, beats = None, time.monotonic(), 0
        while not self._ended.wait(_EVERY):
            beats += 1
            try:
                self._store.set(f"beat/{self.rank}", str(beats))
                if self._store.check(["failed"]):
                    self._end(self._store.get("failed").decode())
                    return
                if self._store.check([f"done/{self._next}"]):
                    continue
                key = f"beat/{self._next}"
                beat = self._store.get(key) if self._store.check([key]) else None
            except RuntimeError:
                self._end(f"The connection to process 0 of {self.world} is lost: it has ended.")
                return
            if beat != heard:
                heard, at = beat, time.monotonic()
            elif self._gone(time.monotonic() - at):
                reason = (
                    f"Process {self._next} of {self.world} (number {self._watched['pid']} on {self._watched['host']}) "
                    "has ended without a word; it was killed, or its machine is gone."
                )
                try:
                    self._store.set("failed", reason)
                except RuntimeError:
                    pass
                self._end(reason)
                return

    def _gone(self, silence: float) -> bool:
        """Whether the watched process has ended; one on this machine may be silent while it is busy."""
        if self._watched["host"] != socket.gethostname():
            return silence > _SILENT
        return not is_running(self._watched["pid"])

    def _end(self, reason: str) -> None:
        """Keep the reason, and end this process if it does not do so itself."""
        self._reason = f"{reason} {_how_to_go_on(self.folder)}"
        self._found.set()
        if not self._ended.wait(_GRACE):
            sys.stderr.write(f"\nerror: {self._reason}\n")
            sys.stderr.flush()
            os._exit(1)


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):  # no /proc on this system
        return True


def _how_to_go_on(folder: Path) -> str:
    newest = max(folder.glob("checkpoint-*"), default=None)
    if newest is None:
        return "No checkpoint was saved yet: run the same command again to start over."
    return f"The last checkpoint is {newest}: run the same command again to go on from there."
