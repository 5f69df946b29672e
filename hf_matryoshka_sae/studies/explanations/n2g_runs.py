"""Runs of tokens read as whole texts: what a latent does on one of their tokens, and what the model finds likely.

Each run stands between the special tokens that the model expects around a text. Runs that are shorter than the longest
of their batch are padded behind; where the model sees what follows, the padding is masked, so that a latent's value
does not depend on what else is in the batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...activations import harvest
from ...activations.text.tokens import frame_of
from ...evaluation.data import HeldOut
from ...features.firings import values_of
from ...models import SAEModel


_TOKENS_AT_ONCE = 2**13

Run = tuple[tuple[int, ...], int]
"""Tokens, and how many of them stand after the one on which a latent is looked at."""


class RunReader:
    """Reads runs with a language model and an SAE.

    Args:
        sae ([`SAEModel`]): Used as it is at inference.
        data ([`HeldOut`]): Its language model, tokenizer and hookpoint.

    Attributes:
        prefix (`list[int]`), suffix (`list[int]`): Special tokens around a text.
        pad (`int`): The token that stands in the place of one that is taken away.
        sees_ahead (`bool`): Whether hidden states depend on what follows.

    Raises:
        `ValueError`: if there is no tokenizer.
    """

    def __init__(self, sae: SAEModel, data: HeldOut) -> None:
        self.sae, self.data = sae, data
        tokenizer = data.tokenizer
        if tokenizer is None:
            raise ValueError("Patterns need the language model's tokenizer: `HeldOut(..., tokenizer=...)`.")
        self.prefix, self.suffix = frame_of(tokenizer)
        first = self.prefix[:1] or [None]
        fillers = (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        self.pad = next(token for token in (*fillers, *first, 0) if token is not None)
        self.sees_ahead = sees_ahead(data)

    def likely(self, runs: list[tuple[int, ...]], count: int) -> list[list[list[int]]]:
        """Return the tokens that the language model finds likeliest at each place of each run, `count` each."""
        front = self.prefix or [self.pad]
        likely = []
        for part in _in_parts([(*front, *run) for run in runs]):
            longest = max(map(len, part))
            ids = torch.tensor([[*run, *[self.pad] * (longest - len(run))] for run in part], device=self.data.device)
            with torch.no_grad():
                logits = self.data.model(input_ids=ids).logits
            best = logits[:, len(front) - 1 : -1].topk(count).indices.tolist()
            likely += [each[: len(run) - len(front)] for each, run in zip(best, part, strict=True)]
        return likely

    def activations(self, latent: int, runs: Sequence[Run]) -> np.ndarray:
        """Return the latent's activation on a token of each run, a text of its own; equal runs are read once."""
        distinct = sorted(set(runs), key=lambda run: len(run[0]))
        values = []
        for part in _in_parts([run[0] for run in distinct], len(self.prefix) + len(self.suffix)):
            these = distinct[len(values) : len(values) + len(part)]
            values += self._read(latent, these).tolist()
        by_run = dict(zip(distinct, values, strict=True))
        return np.array([by_run[run] for run in runs], dtype=np.float64)

    @torch.no_grad()
    def _read(self, latent: int, runs: Sequence[Run]) -> Tensor:
        texts = [[*self.prefix, *tokens, *self.suffix] for tokens, _ in runs]
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[self.pad] * (longest - len(text))] for text in texts], device=self.data.device)
        mask = None
        if self.sees_ahead and any(len(text) < longest for text in texts):
            mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=ids.device)
        # Without a mask padding stands behind, where a token does not see it.
        states = harvest(self.data.model, ids, mask, [self.data.hookpoint])[self.data.hookpoint]
        read = [len(self.prefix) + len(tokens) - 1 - behind for tokens, behind in runs]
        rows = states[torch.arange(len(runs), device=states.device), torch.tensor(read, device=states.device)]
        return latent_values(self.sae, rows.float(), latent)


@torch.no_grad()
def sees_ahead(data: HeldOut) -> bool:
    """Return whether hidden states at the hookpoint depend on tokens that follow, as those of an encoder do."""
    batch = data.batches[0].to(data.device)
    ids = batch.input_ids[:1]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 100
    first, second = (
        harvest(data.model, each, batch.attention_mask[:1], [data.hookpoint])[data.hookpoint][:, :-1]
        for each in (ids, other)
    )
    return bool((first - second).abs().max() > 1e-4 * first.abs().max())


def _in_parts(runs: list[tuple[int, ...]], more: int = 0) -> list[list[tuple[int, ...]]]:
    """Return runs in parts of few enough tokens for one pass of the model, each padded to its longest."""
    parts: list[list[tuple[int, ...]]] = [[]]
    longest = 0
    for run in runs:
        longest = max(longest, len(run) + more)
        if parts[-1] and longest * (len(parts[-1]) + 1) > _TOKENS_AT_ONCE:
            parts.append([])
            longest = len(run) + more
        parts[-1].append(run)
    return parts if parts[0] else []


@torch.no_grad()
def latent_values(sae: SAEModel, x: Tensor, latent: int) -> Tensor:
    """One latent's values `(n,)` on hidden states `(n, D)`, at inference."""
    return values_of(sae.encode_pairs(x.to(sae.W_enc)), torch.tensor([latent]))[:, 0]
