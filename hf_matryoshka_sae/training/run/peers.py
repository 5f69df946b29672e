"""The processes of a run as the system knows them."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


_STATES = {"T": "it is stopped (`kill -CONT {pid}` lets it go on)", "D": "it waits for a disk or a network folder"}


@dataclass(frozen=True)
class Peer:
    """A process of a run.

    Args:
        rank (`int`), world (`int`): Its number, and how many there are.
        pid (`int`): Its number on its machine.
        host (`str`): The machine's name.
        numbers (`str`): Whose process numbers these are: containers of one machine may each have their own.
    """

    rank: int
    world: int
    pid: int
    host: str
    numbers: str

    @classmethod
    def current(cls, rank: int, world: int) -> "Peer":
        """This process."""
        return cls(rank, world, os.getpid(), socket.gethostname(), _numbers())

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world} (pid {self.pid} on {self.host})"

    def is_near(self) -> bool:
        """Whether it is on this machine, where the system knows whether it runs."""
        return (self.host, self.numbers) == (socket.gethostname(), _numbers())

    def is_running(self) -> bool:
        """Whether it runs, for a process on this machine."""
        return is_running(self.pid)

    def condition(self) -> str:
        """Why it does not answer, as far as can be seen from here."""
        state = _state(self.pid) if self.is_near() else None
        return _STATES.get(state, "it is stopped, or hangs").format(pid=self.pid)


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _state(pid) != "Z"


def have_ended(peers: Sequence[Peer]) -> str:
    """A sentence about processes that are gone."""
    names = capitalized(" and ".join(map(str, peers)))
    if len(peers) == 1:
        return f"{names} has ended without a word; it was killed, or its machine is gone."
    return f"{names} have ended without a word; they were killed, or their machine is gone."


def capitalized(text: str) -> str:
    """A sentence's first letter as a capital one."""
    return text[:1].upper() + text[1:]


def _state(pid: int) -> str | None:
    """The system's letter for what a process does; `None` where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


def _numbers() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
