"""When a run does not get on: which of its processes does not answer, or where each of them is."""

import sys
from collections.abc import Mapping
from pathlib import Path

from .board import Beat
from .peers import Peer, capitalized


_SLOWER = 5  # a step is late that takes so many times as long as the longest before it

_PACKAGE = Path(__file__).parents[1]


class Stalls:
    """Decides when to warn of processes that are stopped, hang, or wait for each other.

    A process that does not beat is stopped, or something holds Python's lock. Where all beat and no step comes, that
    is worth a warning only in training: an evaluation, a checkpoint, or the first step, which may compile, take their
    time. Warnings are repeated after twice as long, four times as long and so on.

    Args:
        peers (`dict[int, Peer]`): The processes that are watched.
        patience (`float`): Seconds until the first warning.
    """

    def __init__(self, peers: Mapping[int, Peer], patience: float):
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
    frame = innermost = sys._current_frames().get(thread)
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
