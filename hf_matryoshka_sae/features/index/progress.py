"""Saved states of an unfinished index, in one file for each process: whole or absent, without pickle."""

import json
import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...common.files import staged
from ...models.safetensors_file import give_usual_permissions
from .latent_pass import LatentPass
from .windows import Fired, Position


logger = logging.getLogger(__name__)


_TEXT = "text."


def state_file(folder: Path, rank: int, world: int) -> Path:
    """Return the path of a process's state."""
    return folder / f"state-{rank:05d}-of-{world:05d}.safetensors"


def save_state(path: Path, settings: dict[str, Any], position: Position, state: dict[str, Tensor]) -> None:
    """Replace the file by a newer state, which is complete before it takes the file's name."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    tensors |= {_TEXT + name: tensor.contiguous() for name, tensor in position.tensors().items()}
    with staged(path) as temporary:
        save_file(tensors, temporary, {"settings": json.dumps(settings), "position": position.to_json()})
        give_usual_permissions(temporary)


def load_state(path: Path, settings: dict[str, Any]) -> tuple[Position, dict[str, Tensor]] | None:
    """Load position and state from a file; return `None` where there is none, or one of other settings."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("settings") != json.dumps(settings):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (FileNotFoundError, SafetensorError):
        return None
    text = {name.removeprefix(_TEXT): tensor for name, tensor in tensors.items() if name.startswith(_TEXT)}
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TEXT)}
    return Position.of(metadata["position"], text), state


class States:
    """The saved states of an unfinished index."""

    def __init__(self, folder: Path, about: dict[str, Any], rank: int, world: int) -> None:
        self.folder, self.about, self.rank, self.world = folder, about, rank, world

    def save(self, latent_pass: LatentPass, position: Position) -> None:
        """Save the state of this process."""
        if latent_pass.resumable or self.world > 1:
            save_state(state_file(self.folder, self.rank, self.world), self.about, position, latent_pass.state_dict())

    def load(self, latent_pass: LatentPass) -> Position | None:
        """Load this process's state into `latent_pass`; return the position in the text, `None` without a state."""
        saved = (
            load_state(state_file(self.folder, self.rank, self.world), self.about) if latent_pass.resumable else None
        )
        if saved is None:
            return None
        latent_pass.load_state_dict(saved[1])
        logger.info("Continuing the index in %s at token %d.", self.folder.parent, saved[0].tokens)
        return saved[0]

    def of(self, rank: int) -> dict[str, Tensor]:
        """Return the state of another process, which has finished."""
        saved = load_state(state_file(self.folder, rank, self.world), self.about)
        if saved is None:
            raise ValueError(
                f"The state of process {rank} is not in {self.folder}. All processes need one folder for the index."
            )
        return saved[1]


class Recorder:
    """Adds batches to a pass and saves its state at intervals, and when it is interrupted.

    Args:
        latent_pass ([`LatentPass`]): The pass.
        states ([`States`]): Its saved states.
        save_every (`int`): Tokens between two saved states.
        at_once (`int`): Number of batches that are added together.
        bar: A tqdm bar of tokens.
    """

    def __init__(self, latent_pass: LatentPass, states: States, save_every: int, at_once: int, bar: Any) -> None:
        self.latent_pass, self.states, self.bar = latent_pass, states, bar
        self.save_every, self.at_once = save_every, at_once
        self._waiting: list[Fired] = []
        self._unsaved, self._after = 0, None
        self._whole = True  # whether no batch is added in part, so that the state may be saved
        bar.update(int(latent_pass.sums.tokens))

    def add(self, batches: Iterable[Fired]) -> None:
        """Add all batches."""
        for batch in batches:
            self._waiting.append(batch)
            if len(self._waiting) == self.at_once:
                self._add_waiting()
                if self._unsaved >= self.save_every:
                    self._save()
        self._add_waiting()

    def merge(self, states: Iterable[dict[str, Tensor]]) -> None:
        """Add the saved states of the other processes; from then on nothing is saved any more."""
        self._whole = False
        for state in states:
            self.latent_pass.merge(state)

    @contextmanager
    def kept_when_interrupted(self) -> Iterator[None]:
        """Save the state when Ctrl-C ends the block."""
        try:
            yield
        except KeyboardInterrupt:
            if self._whole:
                self._add_waiting()
                self._save()
            raise

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        with interrupts_later():
            self._whole = False
            self.latent_pass.add(self._waiting)
            self._whole, self._after = True, self._waiting[-1].after
            tokens = sum(batch.tokens for batch in self._waiting)
            self._unsaved += tokens
            self._waiting = []
            self.bar.update(tokens)

    def _save(self) -> None:
        if self._after is not None and self._unsaved:
            self.states.save(self.latent_pass, self._after)
            self._unsaved = 0


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended, so that the block happens wholly or not at all."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    interrupts = []
    signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        before(*interrupts[-1])
