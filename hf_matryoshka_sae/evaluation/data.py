"""The data of an evaluation: a language model, held-out tokens, and a place in the model."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..activations import (
    DatasetConfig,
    TokenBatch,
    harvest,
    has_lm_loss,
    heldout_batches,
    load_language_model,
    resolve_hookpoints,
)
from ..activations.language_model import EMBEDDED
from ..common.distributed import processes


class HasActivations(Protocol):
    """Anything that gives hidden states anew at each call."""

    def activations(self) -> Iterator[Tensor]:
        """Return batches of hidden states, `(n, D)`."""
        ...


@dataclass
class HeldOut:
    """A language model, tokens, and the hookpoint at which SAEs read.

    Args:
        model (`nn.Module`): The language model, in `eval` mode.
        batches (`Sequence[TokenBatch]`): Tokens, the same in every process; each process evaluates its share of them.
        hookpoint (`str`): A module path, or `"path:input"`.
        mask_token_id (`int`, *optional*): Id of the mask token, for a masked language model.
        tokenizer (`Any`, *optional*): Tokenizer, for studies of words.
        kept_states (`dict`, *optional*): Where hidden states are kept for studies that read the same batches again; by
            default they are harvested anew each time.
    """

    model: nn.Module
    batches: Sequence[TokenBatch]
    hookpoint: str
    mask_token_id: int | None = None
    tokenizer: Any = None
    kept_states: dict[Any, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Return the language model's device."""
        return next(self.model.parameters()).device

    @property
    def has_loss(self) -> bool:
        """Return whether the model predicts tokens, so that there is a loss to recapture."""
        return has_lm_loss(self.model)

    @property
    def tokens(self) -> int:
        """Return the number of kept positions, over all processes."""
        return sum(int(batch.keep.sum()) for batch in self.batches)

    def sample(self, tokens: int) -> "HeldOut":
        """Return about so many of the tokens, whole batches from all over the text and one a process at least."""
        whole, world = len(self.batches), processes()[1]
        wanted = min(whole, max(world, round(whole * min(1.0, tokens / max(1, self.tokens)))))
        return replace(self, batches=[self.batches[index * whole // wanted] for index in range(wanted)])

    def share(self) -> Iterator[TokenBatch]:
        """Yield this process's batches, on the model's device: in a run of W processes every W-th batch."""
        rank, world = processes()
        for batch in self.batches[rank::world]:
            yield batch.to(self.device)

    def states(self, batch: TokenBatch) -> Tensor:
        """Return hidden states at the kept positions of a batch, `(n, D)` in float32."""
        ids = batch.input_ids
        key = (self.hookpoint, ids.data_ptr(), ids.shape, ids.stride(), batch.keep.data_ptr())
        if self.kept_states is not None and key in self.kept_states:
            return self.kept_states[key][0]
        states = harvest(self.model, ids, batch.attention_mask, [self.hookpoint])[self.hookpoint]
        states = states[batch.keep].float()
        if self.kept_states is not None:
            self.kept_states[key] = states, batch  # the batch as well, so that no other gets its address
        return states

    def finite(self, batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
        """Return the windows of a batch whose hidden states are all finite, and these states, `(n, D)` in float32.

        NaN or infinity in a window comes from the language model and no SAE can reconstruct it, so that the window is
        left out of SAEs' figures. Both results may be empty.
        """
        states = self.states(batch)
        broken = (~states.isfinite().all(1)).to(batch.keep.device)
        if not broken.any():
            return batch, states
        window = batch.keep.nonzero()[:, 0]
        usable = torch.ones(len(batch.keep), dtype=torch.bool, device=batch.keep.device)
        usable[window[broken]] = False
        kept = usable[window].to(states.device)
        return windows_of(batch, usable), states[kept]

    def activations(self) -> Iterator[Tensor]:
        """Yield hidden states of this process's share, `(n, D)` in float32, harvested anew at each call.

        Windows with a hidden state that is not finite are left out, see [`finite`].
        """
        for batch in self.share():
            _, states = self.finite(batch)
            if len(states):
                yield states


def windows_of(batch: TokenBatch, chosen: Tensor | slice) -> TokenBatch:
    """Return some windows of a batch: `chosen` is a mask `(B,)`, a tensor of positions, or a slice."""
    return TokenBatch(batch.input_ids[chosen], batch.attention_mask[chosen], batch.keep[chosen], batch.padded)


def activation_batches(source: HasActivations | Iterable[Tensor]) -> Iterable[Tensor]:
    """Return the batches `(n, D)` of either kind of source.

    Args:
        source ([`HeldOut`], a tensor `(N, D)`, or an iterable of such): Source of hidden states.
    """
    if isinstance(source, Tensor):
        return [source]
    return source.activations() if hasattr(source, "activations") else source


def as_config(dataset: Any) -> Any:
    """Return text to evaluate on as a [`DatasetConfig`]: a name, a path or a mapping of fields; documents as they are.

    By default, and by the name `"embedded"`, that is the held-out part of the embedded text.
    """
    if dataset is None or dataset == EMBEDDED:
        return DatasetConfig(EMBEDDED, split="heldout")
    if isinstance(dataset, (str, os.PathLike)):
        return DatasetConfig(str(dataset))
    return DatasetConfig(**dataset) if isinstance(dataset, dict) else dataset


def open_heldout(
    model: str = "embedded",
    hookpoint: str | None = None,
    dataset: str | dict[str, Any] | DatasetConfig | None = None,
    tokens: int = 60_000,
    context_length: int = 128,
    lm_batch_size: int = 32,
    exclude: str = "special",
    revision: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> HeldOut:
    """Open a language model and text to evaluate on.

    Args:
        model (`str`, *optional*, defaults to `"embedded"`): Hub id, folder, or the model that ships with the package.
        hookpoint (`str`): Hookpoint of the SAE, as in its config; there is no default.
        dataset (`str`, `dict` or [`DatasetConfig`], *optional*): Held-out text, as in a run's YAML; by default the
            embedded text.
        tokens (`int`, *optional*, defaults to 60,000): Kept tokens to read.
        context_length (`int`, *optional*, defaults to 128): Tokens in a window.
        lm_batch_size (`int`, *optional*, defaults to 32): Windows in a batch.
        exclude (`str`, *optional*, defaults to `"special"`): Positions left out: `special`, `first` or `none`.
        revision (`str`, *optional*): Branch, tag or commit of the language model.
        dtype (`str`, *optional*): Type of the language model, see [`load_language_model`].
        device (`str` or `torch.device`, *optional*): Device of the language model; by default a GPU if there is one.

    Raises:
        `ValueError`: if the model, its hookpoint or the text cannot be found, or the text is too short.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lm, tokenizer = load_language_model(model, revision, dtype, device)
    if hookpoint is None:
        raise ValueError("Name the `hookpoint` at which the SAE reads, for example 'model.layers.2'.")
    (place,) = resolve_hookpoints(lm, [hookpoint])
    batches = heldout_batches(as_config(dataset), tokenizer, context_length, tokens, lm_batch_size, exclude=exclude)
    return HeldOut(lm, batches, place, tokenizer.mask_token_id, tokenizer)
