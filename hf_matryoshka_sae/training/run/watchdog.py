"""A run of several processes ends everywhere, and says why, when one of them does; it warns when one does not go on.

Left alone, the others would wait for it: gloo notices a closed connection, NCCL only a timeout, which must be hours
long because some work takes hours. Here every process looks after those of its machine by their numbers, and process 0
after all, through a store of the run's own.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from .peers import Beat, Board, Peer, capitalized, have_ended


logger = logging.getLogger(__name__)

PATIENCE = 180.0
"""Seconds without an answer of a process, or without a step of any, after which a run warns."""

_EVERY = 1.0  # seconds between looks
_SILENT = 120.0  # seconds after which a machine of which nothing is heard counts as gone
_SUSPICIOUS = 4.0  # the same where the loss of a process would explain an error of another
_GRACE = 8.0  # seconds in which a process may end by itself
_KEPT = 30.0  # seconds for which a process of this machine that is stopped can still read why the run ended
_SLOWER = 5  # a step is late that takes so many times as long as the longest before it
_PACKAGE = Path(__file__).parents[2]


class LostProcess(RuntimeError):
    """Another process of the run has ended."""


class _Terminated(SystemExit):
    """The process was asked to end."""


def _leave(number: int, _frame: Any) -> None:
    raise _Terminated(128 + number)


class Watchdog:
    """Watches the processes of a run for the time of a `with` block.

    A process on the same machine is gone when its number is; those on another when nothing has been heard of any of
    that machine for two minutes. All that are left then end within ten seconds, whatever they are waiting for, with a
    message on stderr and status 1. The first reason given stands for all: a process gives one before it ends because
    another has, and process 0, whose end would look like a loss to the others, waits until they know. An error that
    one process raises is told to all. A process that is stopped or hangs is warned of; the run waits for it.

    Args:
        accelerator (`Accelerator`): Owns the processes; with one, nothing is done.
        folder (`Path`): The run's, for the message.
        patience (`float`, *optional*): Seconds until a warning, three minutes by default.

    Raises:
        [`LostProcess`]: in place of the error that the loss of another process has led to in this one.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, patience: float | None = None) -> None:
        self.rank, self.world, self.folder = accelerator.process_index, accelerator.num_processes, folder
        self.patience = PATIENCE if patience is None else patience
        self._reason: str | None = None
        self._ended = threading.Event()
        self._found = threading.Event()
        self._thread: threading.Thread | None = None
        self._working_thread = threading.get_ident()
        self._progressed = 0.0  # when the last step was done
        self._before = None  # what SIGTERM did

    def __enter__(self) -> "Watchdog":
        if self.world > 1:
            if threading.current_thread() is threading.main_thread():
                self._before = signal.signal(signal.SIGTERM, _leave)
            try:
                self._meet()
            except RuntimeError as error:  # a network that lets only some ports through, say
                logger.warning(
                    f"Processes cannot watch each other ({error}): if one dies, the others may wait for it."
                )
                return self
            self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def progress(self, step: int, doing: str = "training") -> None:
        """Tell how far this process is.

        Args:
            step (`int`): Optimizer steps done.
            doing (`str`, *optional*, defaults to `"training"`): What comes next. Only training is expected to get on.
        """
        if self._thread is not None:
            self._progressed = time.monotonic()
            self._board.mine.step, self._board.mine.doing, self._board.mine.where = step, doing, ""

    def _meet(self) -> None:
        """Learn who the other processes are."""
        store = self._open_store()
        self._board = Board(store, self.rank)
        store.set(f"peer/{self.rank}", json.dumps(asdict(Peer.current(self.rank, self.world))))
        texts = store.multi_get([f"peer/{rank}" for rank in range(self.world)])
        self._peers = [Peer(**json.loads(text)) for text in texts]
        self._near = [peer for peer in self._peers if peer.rank != self.rank and peer.is_near()]
        # Process 0 looks after all, process 1 after process 0, and each after those of its machine.
        watched = range(1, self.world) if self.rank == 0 else [0] if self.rank == 1 else []
        self._watched = {rank: self._peers[rank] for rank in watched}
        self._stalls = Stalls(self._watched, self.patience)
        self._board.read(sorted({0, *watched, *(peer.rank for peer in self._near)} - {self.rank}))

    def _open_store(self) -> dist.TCPStore:
        """A store of the run's own: torch's is busy while a process waits for another."""
        address, store, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), None, timedelta(seconds=60)
        port = [None]
        if self.rank == 0:
            store = dist.TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            port = [store.port]
        dist.broadcast_object_list(port, 0)
        return store or dist.TCPStore(address, port[0], is_master=False, timeout=timeout, wait_for_workers=False)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
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
        is_consequence = isinstance(error, RuntimeError | _Terminated)
        if is_consequence:
            self._board.mine.suspects_loss = True
            self._found.wait(_GRACE)
        self._ended.set()
        self._thread.join(3 * _EVERY)
        is_told = is_consequence and self._reason is not None
        if not is_told and error is not None and not getattr(error, "on_all_processes", False):
            what = f"failed: {error}" if isinstance(error, Exception) else "was asked to end."
            self._board.end_run(f"Process {self.rank} of {self.world} {what}", _EVERY)
        self._board.mine.leaving = "told" if is_told else "done"
        self._board.refresh(_EVERY)
        if self.rank == 0:
            self._wait_for_others()
        if is_told:
            raise LostProcess(self._reason) from error

    def _wait_for_others(self) -> None:
        """Keep the store until nobody needs it: its end looks like a loss to whoever does not know better."""
        began, near = time.monotonic(), {peer.rank for peer in self._near}
        while (waited := time.monotonic() - began) < _KEPT and self._board.refresh(_EVERY):
            gone = {peer.rank for peer in self._near if not peer.is_running()}
            given_up = (
                gone if waited < _GRACE else gone | (self._board.beats.keys() - near)
            )  # of far ones nobody knows
            if all(beat.leaving or rank in given_up for rank, beat in self._board.beats.items()):
                return
            time.sleep(0.1)

    def _work(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(_EVERY):
            now = time.monotonic()
            if now - looked > max(10 * _EVERY, self.patience / 2):  # this process was stopped itself
                self._board.forget_silences()
                self._stalls = Stalls(self._watched, self.patience)
            looked = now
            reason = self._reason_to_end()
            if reason is not None:
                self._end(reason)
                return
            self._warn()

    def _reason_to_end(self) -> str | None:
        """What has happened to the run, if anything has."""
        board, gone = self._board, self._gone()
        # Whoever ends well, or because another has, says so before: ask after having seen who is gone.
        is_answered = self._peers[0] not in gone and board.refresh(2 * _EVERY)
        if board.failure is not None:
            return board.failure
        if board.is_lost or self._peers[0] in gone:
            return self._loss_of_store()
        if not is_answered and not board.mine.suspects_loss:
            return None  # process 0 is stopped, or slow: the next look tells more
        gone = [peer for peer in gone + self._silent() if not board.beats[peer.rank].leaving]
        return board.end_run(have_ended(gone), 2 * _EVERY) if gone else None

    def _gone(self) -> list[Peer]:
        """The processes of this machine that run no more."""
        return [peer for peer in self._near if not peer.is_running()]

    def _silent(self) -> list[Peer]:
        """Those of the machines of which process 0 hears nothing; one that is heard would say who is gone there."""
        if self.rank != 0:
            return []
        board, now = self._board, time.monotonic()
        is_suspected = board.mine.suspects_loss or any(beat.suspects_loss for beat in board.beats.values())
        limit = _SUSPICIOUS if is_suspected else _SILENT
        far: dict[str, list[Peer]] = {}
        for peer in self._peers[1:]:
            if peer not in self._near and not board.beats[peer.rank].leaving:
                far.setdefault(peer.host, []).append(peer)
        machines = [peers for peers in far.values() if all(now - board.heard[peer.rank] > limit for peer in peers)]
        return [peer for peers in machines for peer in peers]

    def _loss_of_store(self) -> str | None:
        """Who has ended when the connection to process 0 has."""
        first = self._peers[0]
        for _ in range(30):  # a process closes its connections before it is gone
            if not first.is_near() or not first.is_running():
                break
            time.sleep(0.1)
        gone = [peer for peer in self._gone() if not self._board.beats[peer.rank].leaving]
        if gone:
            return have_ended(gone)
        if first.is_near() or self._board.beats[0].leaving:
            return None
        return f"The connection to {first} is lost: it was killed, or its machine or network is gone."

    def _warn(self) -> None:
        """Say which processes do not answer, and where all are if no step comes."""
        board, now = self._board, time.monotonic()
        is_late = board.mine.doing == "training" and now - self._progressed > self.patience / 2
        board.mine.where = whereabouts(self._working_thread) if is_late else ""
        warnings = self._stalls.of_silence(now, board.beats, board.heard)
        if self.rank == 0:
            warnings += self._stalls.of_steps(now, {0: board.mine, **board.beats})
        for warning in warnings:
            logger.warning(warning)

    def _end(self, reason: str) -> None:
        """Keep the reason, and end this process if it does not do so itself."""
        self._reason = f"{reason} {_how_to_go_on(self.folder)}"
        self._found.set()
        self._board.mine.leaving = "told"
        self._board.refresh(_EVERY)
        if not self._ended.wait(_GRACE):
            sys.stderr.write(f"\nerror: {self._reason}\n")
            sys.stderr.flush()
            os._exit(1)


def _how_to_go_on(folder: Path) -> str:
    newest = max(folder.glob("checkpoint-*"), default=None)
    if newest is None:
        return "No checkpoint was saved yet: run the same command again to start over."
    return f"The last checkpoint is {newest}: run the same command again to go on from there."


class Stalls:
    """Decides when to warn of processes that are stopped, hang, or wait for each other.

    A process that does not beat is stopped, or something holds Python's lock. Where all beat and no step comes, that
    is worth a warning only in training: an evaluation, a checkpoint, or the first step, which may compile, take their
    time. Warnings are repeated after twice as long, four times as long and so on.

    Args:
        peers (`dict[int, Peer]`): The processes that are watched.
        patience (`float`): Seconds until the first warning.
    """

    def __init__(self, peers: Mapping[int, Peer], patience: float) -> None:
        self.peers, self.patience = peers, patience
        self._silence_limits = dict.fromkeys(peers, patience)
        self._step, self._longest, self._step_limit = 0, 0.0, patience
        self._since: float | None = None  # when the last step came
        self._anyone_is_silent = False  # which keeps steps from coming

    def of_silence(self, now: float, beats: Mapping[int, Beat], heard: Mapping[int, float]) -> list[str]:
        """The warnings of processes that do not answer that are due.

        Args:
            now (`float`): Seconds, on the clock of `heard`.
            beats (`dict[int, Beat]`): Of the processes that are watched.
            heard (`dict[int, float]`): When each was last heard.
        """
        silences = {rank: now - heard[rank] for rank in self.peers if not beats[rank].leaving}
        self._anyone_is_silent = any(silence > self.patience for silence in silences.values())
        return [text for rank, silence in silences.items() if (text := self._of_silence(rank, silence))]

    def of_steps(self, now: float, beats: Mapping[int, Beat]) -> list[str]:
        """The warning that no step comes, where it is due.

        Args:
            now (`float`): Seconds.
            beats (`dict[int, Beat]`): Of all processes.
        """
        step = max(beat.step for beat in beats.values())
        in_training = all(beat.doing == "training" for beat in beats.values()) and not self._anyone_is_silent
        if self._since is None or step != self._step or not in_training:
            if self._since is not None and step == self._step + 1 and in_training:
                self._longest = max(self._longest, now - self._since)
            self._step, self._since = step, now
            self._step_limit = max(self.patience, _SLOWER * self._longest)
            return []
        if now - self._since <= self._step_limit:
            return []
        self._step_limit *= 2
        return [
            f"No step for {_duration(now - self._since)}; the last was step {step}. The processes are at "
            f"{_places(beats)}. If they wait for each other, end the run: the same command goes on from its last "
            "checkpoint."
        ]

    def _of_silence(self, rank: int, silence: float) -> str | None:
        peer, limit = self.peers[rank], self._silence_limits[rank]
        if silence > limit:
            self._silence_limits[rank] = 2 * limit
            return (
                f"{capitalized(str(peer))} has not answered for {_duration(silence)}: {peer.condition()}. The others "
                "wait for it; the run goes on when it does."
            )
        if silence < self.patience < limit:
            self._silence_limits[rank] = self.patience
            return f"{capitalized(str(peer))} answers again."
        return None


def whereabouts(thread: int) -> str:
    """The line of this package at which a thread is, and the function it waits in.

    Args:
        thread (`int`): Its `threading.Thread.ident`.
    """
    frame = innermost = sys._current_frames().get(thread)  # noqa: SLF001  (no public way to another thread's frame)
    while frame is not None and _PACKAGE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    path = Path(frame.f_code.co_filename).relative_to(_PACKAGE)
    return f"{path}:{frame.f_lineno}, in {innermost.f_code.co_name}"


def _places(beats: Mapping[int, Beat]) -> str:
    """`a.py:3, in f (0, 2); b.py:4, in g (1)`: each place, and the ranks of the processes that are there."""
    ranks: dict[str, list[int]] = {}
    for rank in sorted(beats):
        ranks.setdefault(beats[rank].where or "an unknown place", []).append(rank)
    return "; ".join(f"{place} (process {', '.join(map(str, at))})" for place, at in ranks.items())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
