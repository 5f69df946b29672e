"""The processes of a run: what the system knows of them, and what they tell each other while they work."""

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil


_FAILURE = "failure"
_STATES = {
    psutil.STATUS_STOPPED: "it is stopped (`kill -CONT {pid}` lets it go on)",
    psutil.STATUS_DISK_SLEEP: "it waits for a disk or a network folder",
}


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
    return _state(pid) not in (None, psutil.STATUS_ZOMBIE)


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
    """What a process does, in psutil's words; `None` where there is none of this number."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return psutil.STATUS_RUNNING


def _numbers() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@dataclass
class Beat:
    """What a process says of itself, again and again.

    Args:
        number (`int`): Grows with every beat: where it does not, the process is stopped or gone.
        step (`int`): Optimizer steps done.
        doing (`str`): `training` between the first step of a session and its last; otherwise what else.
        where (`str`): The line at which a step stays away; empty while steps come.
        suspects_loss (`bool`): An error has reached it that another process's end would explain.
        leaving (`str`): `done` where it ends by itself, `told` where it ends because it knows why the run does.
    """

    number: int = 0
    step: int = 0
    doing: str = "starting"
    where: str = ""
    suspects_loss: bool = False
    leaving: str = ""


class Board:
    """A store of the run's own that only a thread of the board talks to.

    Where the process that holds the store is stopped, requests hang without a timeout, and nobody else must.

    Args:
        store (`torch.distributed.Store`): Apart from torch's own, which is busy while a process waits for another.
        rank (`int`): This process.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.mine = Beat()
        self.beats: dict[int, Beat] = {}
        """Of the processes that are read."""
        self.heard: dict[int, float] = {}
        """When each process's beat last changed, on the monotonic clock."""
        self.failure: str | None = None
        """Why the run ends: the first reason that any process gave."""
        self.is_lost = False
        """Whether the process that holds the store has closed the connection."""
        self._store, self._key = store, _key(rank)
        self._reason: str | None = None  # what this process says of the run's end
        self._requests = threading.Condition()
        self._asked = self._answered = 0
        self._store.set(self._key, json.dumps(asdict(self.mine)))

    def read(self, ranks: Sequence[int]) -> None:
        """Begin to read the beats of other processes, each of which must have made its board."""
        self.beats = {rank: Beat() for rank in ranks}
        self.heard = dict.fromkeys(ranks, time.monotonic())
        threading.Thread(target=self._talk, name="board", daemon=True).start()

    def refresh(self, timeout: float) -> bool:
        """Say and hear what is new.

        Args:
            timeout (`float`): Seconds to wait at most.

        Returns:
            `bool`: Whether what is known of the others is now from after the call.
        """
        with self._requests:
            self._asked += 1
            mine = self._asked
            self._requests.notify_all()
            self._requests.wait_for(lambda: self._answered >= mine or self.is_lost, timeout)
            return self._answered >= mine

    def end_run(self, reason: str, timeout: float) -> str:
        """Say why the run ends; returns the reason that all go by, which is the first one given."""
        self._reason = reason
        self.refresh(timeout)
        return self.failure or reason

    def forget_silences(self) -> None:
        """Count every process as heard just now."""
        self.heard = dict.fromkeys(self.heard, time.monotonic())

    def _talk(self) -> None:
        while not self.is_lost:
            with self._requests:
                self._requests.wait_for(lambda: self._asked > self._answered)
                asked = self._asked
            try:
                self._exchange()
            except RuntimeError:
                self.is_lost = True
            with self._requests:
                self._answered = self._answered if self.is_lost else asked
                self._requests.notify_all()

    def _exchange(self) -> None:
        self.mine.number += 1
        self._store.set(self._key, json.dumps(asdict(self.mine)))
        if self._reason is not None:
            # Only the first reason stays: what follows from an end must not be taken for its cause.
            self._store.compare_set(_FAILURE, "", self._reason)
        texts = self._store.multi_get([_key(rank) for rank in self.beats])  # would wait for one that is missing
        for rank, text in zip(self.beats, texts, strict=True):
            beat = Beat(**json.loads(text))
            if beat.number != self.beats[rank].number:
                self.heard[rank] = time.monotonic()
            self.beats[rank] = beat
        # Read last: a process that ends because of another has given the reason before it says that it leaves.
        if self._store.check([_FAILURE]):
            self.failure = self._store.get(_FAILURE).decode()


def _key(rank: int) -> str:
    return f"beat/{rank}"
