"""Shuffling windows of text before the language model sees them.

A shuffle buffer of hidden states holds a few documents' worth of tokens: a long document fills it, and latents of
every other subject fall silent meanwhile. A token costs 5 bytes where its hidden state costs thousands, so a pool of
windows spreads long documents over millions of tokens for a few megabytes.
"""

from collections.abc import Iterator
from typing import Any

import torch

from .tokens import TokenBatch, TokenStream


class WindowShuffle:
    """Batches of windows drawn at random from a pool that an endless, packed [`TokenStream`] refills.

    Args:
        tokens ([`TokenStream`]): Source of the windows.
        pool_tokens (`int`): Tokens in the pool, which is never larger than one epoch of the text.
        seed (`int`): Seed of the draws.

    Raises:
        `ValueError`: if the stream is not packed or not endless.
    """

    def __init__(self, tokens: TokenStream, pool_tokens: int, seed: int) -> None:
        if not tokens.pack or tokens.num_epochs is not None:
            raise ValueError(
                "Windows are shuffled in an endless stream of packed text: use pack=True, num_epochs=None."
            )
        self.tokens = tokens
        self.context_length, self.batch_size_sequences = tokens.context_length, tokens.batch_size_sequences
        self._capacity = pool_tokens // tokens.context_length
        self._generator = torch.Generator().manual_seed(seed)
        self._ids = torch.zeros(0, self.context_length, dtype=torch.int32)
        self._keep = torch.zeros(0, self.context_length, dtype=torch.bool)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        if not len(self._ids):
            self._fill()
        fresh = next(self.tokens)
        drawn = torch.randperm(len(self._ids), generator=self._generator)[: len(fresh.input_ids)]
        ids, keep = self._ids[drawn].long(), self._keep[drawn]
        self._ids[drawn], self._keep[drawn] = fresh.input_ids.int(), fresh.keep
        return TokenBatch(ids, torch.ones_like(ids), keep, padded=False)

    def _fill(self) -> None:
        batches = [next(self.tokens)]
        epoch = self.tokens.epoch
        while len(batches) * self.batch_size_sequences < self._capacity and self.tokens.epoch == epoch:
            batches.append(next(self.tokens))
        self._ids = torch.cat([batch.input_ids.int() for batch in batches])
        self._keep = torch.cat([batch.keep for batch in batches])

    def state_dict(self) -> dict[str, Any]:
        """Return the pool, the generator of draws and the position in the text."""
        return {
            "tokens": self.tokens.state_dict(),
            "ids": self._ids,
            "keep": self._keep,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.tokens.load_state_dict(state["tokens"])
        self._ids, self._keep = state["ids"].clone(), state["keep"].clone()
        self._generator.set_state(state["generator"])
