"""The text of an index as numbered windows, of which each process takes its share, and the latents that fire there.

Every process reads all of the text and runs the language model on every world-size-th batch, so that a window has the
same number whatever the number of processes.

Shapes: B windows in a batch, S tokens in a window, D width, F latents.
"""

import json
import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...activations import TokenBatch, TokenStream, harvest
from ...models import SAEModel
from ...progressive.statistics import firing_blocks
from ..firings import Firings, joined_pairs


logger = logging.getLogger(__name__)


@dataclass
class Position:
    """A place in the text.

    Args:
        batches (`int`): Number of batches before it, over all processes.
        tokens (`int`): Number of tokens before it, over all processes.
        stream (`dict`): State of the token stream.
    """

    batches: int
    tokens: int
    stream: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the stream's state."""
        return {name: value for name, value in self.stream.items() if isinstance(value, Tensor)}

    def to_json(self) -> str:
        """Return everything but the tensors as JSON."""
        stream = {name: value for name, value in self.stream.items() if not isinstance(value, Tensor)}
        return json.dumps({"batches": self.batches, "tokens": self.tokens, "stream": stream})

    @classmethod
    def of(cls, text: str, tensors: dict[str, Tensor]) -> "Position":
        """Restore a position from [`to_json`] and [`tensors`]."""
        position = json.loads(text)
        return cls(position["batches"], position["tokens"], position["stream"] | tensors)


@dataclass
class Windows:
    """A batch of windows.

    Args:
        batch ([`TokenBatch`]): Tokens of the windows, on the host.
        first (`int`): Number of the first window in the text.
        after ([`Position`]): Position in the text behind the batch.
    """

    batch: TokenBatch
    first: int
    after: Position


class NumberedWindows:
    """This process's batches of the first tokens of a text.

    Args:
        stream ([`TokenStream`]): Stream of one epoch, the same in every process.
        tokens (`int`): Number of kept tokens, over all processes.
        rank (`int`): Number of this process.
        world (`int`): Number of processes.
    """

    def __init__(self, stream: TokenStream, tokens: int, rank: int, world: int) -> None:
        self.stream, self.tokens, self.rank, self.world = stream, tokens, rank, world
        self.position = Position(0, 0, {})

    def go_to(self, position: Position) -> None:
        """Continue from a position."""
        self.stream.load_state_dict(position.stream)
        self.position = position

    def __iter__(self) -> Iterator[Windows]:
        while self.position.tokens < self.tokens:
            batch = next(self.stream, None)
            if batch is None:
                self._ended()
                return
            batch = self._within(batch)
            number = self.position.batches
            tokens = self.position.tokens + int(batch.keep.sum())
            mine = number % self.world == self.rank
            self.position = Position(number + 1, tokens, self.stream.state_dict() if mine else {})
            if mine:
                yield Windows(batch, number * self.stream.batch_size_sequences, self.position)

    def _within(self, batch: TokenBatch) -> TokenBatch:
        """Return the batch without the positions beyond the number of tokens."""
        room = self.tokens - self.position.tokens
        counted = batch.keep.flatten().cumsum(0).view_as(batch.keep)
        if counted[-1, -1] <= room:
            return batch
        keep = batch.keep & (counted <= room)
        count = int(keep.any(1).nonzero().max()) + 1
        return TokenBatch(batch.input_ids[:count], batch.attention_mask[:count], keep[:count], batch.padded)

    def _ended(self) -> None:
        tokens = self.position.tokens
        if tokens == 0:
            raise ValueError(
                f"The data set has no tokens to read: it does not fill one window of {self.stream.context_length}. "
                "Use more text or a smaller `context_length`."
            )
        if self.rank == 0:
            logger.warning("The data set has %d tokens, fewer than `tokens` (%d).", tokens, self.tokens)


@dataclass
class Harvested:
    """Hidden states of a batch, at kept and at first positions.

    Args:
        windows ([`Windows`]): The batch.
        states (`Tensor` of shape `(N, D)`): Hidden states.
        tokens (`Tensor` of shape `(N,)`): Place `window * S + position` of each.
        counted (`Tensor` of shape `(N,)`): bool; `False` at first positions that are left out of the counts.
    """

    windows: Windows
    states: Tensor
    tokens: Tensor
    counted: Tensor


@torch.no_grad()
def harvested(windows: Iterable[Windows], model: nn.Module, hookpoint: str) -> Generator[Harvested]:
    """Yield hidden states of batches from a forward pass that stops at the hookpoint, always with first positions."""
    device = next(model.parameters()).device
    for each in windows:
        batch = each.batch.to(device)
        mask = batch.attention_mask if batch.padded else None
        states = harvest(model, batch.input_ids, mask, [hookpoint])[hookpoint]
        positions = batch.keep.clone()
        positions[:, 0] = batch.attention_mask[:, 0].bool()
        tokens = positions.flatten().nonzero().squeeze(1)
        yield Harvested(each, states.flatten(0, 1)[tokens], tokens, batch.keep.flatten()[tokens])


@dataclass
class Fired:
    """The latents that fire in a batch.

    Args:
        firings ([`Firings`]): Firings at the positions that count.
        first (`Tensor` of shape `(m,)`): Latents that fire at first positions, counted or not.
        first_counts (`bool`): Whether first positions are counted.
        counted (`Tensor` of shape `(N,)`): bool; which of the positions in `firings.tokens` count.
        tokens (`int`): Number of positions that count.
        after ([`Position`]): Position in the text behind the batch.
    """

    firings: Firings
    first: Tensor
    first_counts: bool
    counted: Tensor
    tokens: int
    after: Position


@torch.no_grad()
def fired(sae: SAEModel, batch: Harvested) -> Fired:
    """Encode a batch and return the latents that fire in it.

    Raises:
        `ValueError`: if hidden states are not finite or of another width than the SAE's.
    """
    device = sae.W_enc.device
    ids = batch.windows.batch.input_ids.to(device)
    pairs = joined_pairs([pairs for _, _, pairs in firing_blocks(sae, [batch.states.to(device)])])
    tokens, counted = batch.tokens.to(device), batch.counted.to(device)
    at_first = tokens % ids.shape[1] == 0
    first_counts = bool(counted[at_first].any())
    first = pairs.cols[at_first[pairs.rows] & (pairs.values > 0)]
    firings = Firings.of(ids, batch.windows.first, tokens, pairs, counted[pairs.rows])
    return Fired(firings, first, first_counts, counted, int(counted.sum()), batch.windows.after)


def fired_in(sae: SAEModel, batches: Generator[Harvested]) -> Generator[Fired]:
    """Yield the latents that fire in each batch."""
    with closing(batches):
        for batch in batches:
            yield fired(sae, batch)
