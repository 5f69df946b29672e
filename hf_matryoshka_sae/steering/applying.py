"""Changes of hidden states while a model runs: hooks that add what every active change wants.

All changes at one hookpoint read the hidden states as they come, whatever context they were made in, and their
differences add up: two nested contexts do what one with both changes does.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..activations import hookpoint_widths, resolve_hookpoints
from ..activations.hookpoints import first_tensor, hooked, split_hookpoint
from ..models.sparse_ops import at_least_float32
from .parts import Part
from .passes import Passes, eager, shared, unwrapped, watched
from .residual import writers_of


logger = logging.getLogger(__name__)

COLLAPSE = 1.0
"""Relative dose above which a warning is given: useful ones end below 1, and collapse is published at about 2."""

_WIDTHS: "WeakKeyDictionary[nn.Module, dict[str, int]]" = WeakKeyDictionary()


@contextmanager
def applied(model: nn.Module, parts: Sequence[Part], quiet: bool = False) -> Iterator[None]:
    """Change hidden states in this thread's forward passes of a model while the block runs.

    Args:
        model (`nn.Module`): A transformers model; also one that PEFT or `torch.compile` wrapped. Compiled code runs as
            it is written for that time, see [`eager`].
        parts (`Sequence[Part]`): The changes.
        quiet (`bool`, *optional*, defaults to `False`): Whether to say nothing of a change that is too large.

    Raises:
        `ValueError`: if the model has no such hookpoint, or hidden states of another width there.
    """
    models = unwrapped(model)
    inner = models[-1]
    places = [place for part in parts for place in _places(inner, part)]
    with ExitStack() as stack:
        stack.enter_context(eager(model))
        # The outer one first: the inner one's record of a pass is the one that counts.
        passes = [stack.enter_context(shared(each, "passes", lambda each=each: watched(each))) for each in models]
        for hookpoint, part in places:
            changes = stack.enter_context(shared(inner, hookpoint, lambda name=hookpoint: _changing(inner, name)))
            changes.warned |= quiet
            stack.enter_context(changes.including(part, passes))
        yield


def _places(model: nn.Module, part: Part) -> list[tuple[str, Part]]:
    """Return the hookpoints at which a change is made, with its vectors where the hidden states are."""
    if part.mode == "erase":
        hookpoints = writers_of(model)
    else:
        hookpoints = resolve_hookpoints(model, [part.hookpoint])
        if len(hookpoints) > 1:
            raise ValueError(f"The hookpoint {part.hookpoint!r} names {len(hookpoints)} modules; steering needs one.")
    check_width(model, part)
    weight = next(model.get_submodule(split_hookpoint(hookpoints[0])[0]).parameters(), None)
    if weight is not None and weight.device.type != "meta":  # otherwise they are copied in each pass
        part = replace(part, vectors=part.vectors.to(weight.device))
    return [(hookpoint, part) for hookpoint in hookpoints]


def check_width(model: nn.Module, part: Part) -> None:
    """Raise `ValueError` if a model's hidden states at a hookpoint have another width than the vectors."""
    widths = _WIDTHS.setdefault(model, {})
    if part.mode != "erase" and part.hookpoint not in widths:
        with torch.random.fork_rng(enabled=model.training):  # dropout must not move what is sampled later
            widths |= hookpoint_widths(model, [part.hookpoint])
    width = model.get_input_embeddings().weight.shape[1] if part.mode == "erase" else widths[part.hookpoint]
    if width != part.vectors.shape[1]:
        raise ValueError(
            f"The SAE's latents have width {part.vectors.shape[1]}, and {type(model).__name__} has hidden states of "
            f"width {width} at {part.hookpoint!r}. It was made for {part.base_model or 'another model'}."
        )


class _Changes:
    """A hook for [`hooked`] that adds up the differences of all changes at one hookpoint."""

    def __init__(self) -> None:
        self.active: list[tuple[Part, list[Passes]]] = []
        self.warned = False

    @contextmanager
    def including(self, part: Part, passes: list[Passes]) -> Iterator[None]:
        """Take a change in for as long as the block runs."""
        entry = (part, passes)
        self.active.append(entry)
        try:
            yield
        finally:
            # By identity: the same change may be in twice.
            del self.active[next(n for n, each in enumerate(self.active) if each is entry)]

    def __call__(self, hookpoint: str, value: Any) -> Tensor | None:
        """Return changed hidden states in place of a module's output."""
        states = first_tensor(value)
        if states is None or states.ndim != 3 or states.shape[-1] != self.active[0][0].vectors.shape[1]:
            got = "nothing of the kind" if states is None else list(states.shape)
            raise ValueError(f"Hookpoint '{hookpoint}' must carry hidden states [batch, sequence, width], got {got}.")
        with torch.no_grad():
            total: Tensor | int = 0
            for part, passes in self.active:
                total = total + _difference(states, part, passes)
            self._warn(hookpoint, states, total)
        return states + total.to(states)

    def _warn(self, hookpoint: str, states: Tensor, total: Tensor) -> None:
        """Say once if the change is larger than the hidden states themselves."""
        if self.warned or all(part.mode == "erase" for part, _ in self.active):
            return
        self.warned = True  # only the first pass is looked at: the host waits for the device
        norms = torch.linalg.vector_norm(states.float(), dim=-1).median()
        dose = float(torch.linalg.vector_norm(total.float(), dim=-1).max() / norms.clamp(min=1e-30))
        if dose > COLLAPSE:
            logger.warning(
                "The change at %s is %.1f times as long as the hidden states: a model mostly loses its language "
                "above %.1f. Take smaller values, or dose='auto'.",
                hookpoint,
                dose,
                COLLAPSE,
            )


def _difference(states: Tensor, part: Part, passes: list[Passes]) -> Tensor:
    """Return what a change adds to hidden states `[B, S, D]`, of that shape or `(D,)`."""
    shape, told = states.shape[:2], next((each for each in reversed(passes) if each.running), passes[-1])
    chosen = told.chosen(shape, part.positions, part.from_position)
    if chosen is None and not part.needs_sae:
        added = part.difference(states.reshape(-1, states.shape[-1]))
        return added if added.ndim == 1 else added.view(states.shape)
    real = told.real(shape) if part.needs_sae else None  # what is encoded must not hang on the padding
    if real is not None:
        chosen = real if chosen is None else chosen.to(real.device) & real
    total = states.new_zeros(states.shape, dtype=at_least_float32(states.dtype))
    if chosen is None:
        chosen = torch.ones(shape, dtype=torch.bool)
    chosen = chosen.to(states.device)
    if chosen.any():
        total[chosen] = part.difference(states[chosen]).to(total)
    return total


def _changing(model: nn.Module, hookpoint: str) -> AbstractContextManager[_Changes]:
    @contextmanager
    def changing() -> Iterator[_Changes]:
        changes = _Changes()
        with hooked(model, [(hookpoint, changes)]):
            yield changes

    return changing()
