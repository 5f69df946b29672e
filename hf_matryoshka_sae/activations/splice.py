"""Spliced cross-entropy: the language model's loss when hidden states are replaced.

Hidden states at the kept positions of a token batch are exchanged for something else (a reconstruction, zero, the
mean), the others stay, and the loss is counted where they were exchanged: for causal models the prediction made at
each kept position whose next token exists, for masked models the kept positions that were masked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .hookpoints import first_tensor, hooked, run_model
from .text.tokens import TokenBatch


_MASKED_SHARE = 0.15
_POSITIONS_AT_ONCE = 1024  # scored together: their float32 copy is positions x vocabulary


def has_lm_loss(model: nn.Module) -> bool:
    """Return whether the model predicts tokens: true with a causal or masked language-model head."""
    return model.get_output_embeddings() is not None


def is_masked_lm(model: nn.Module) -> bool:
    """Return whether the model predicts masked tokens, and not the next ones."""
    return type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def spliced_losses(
    model: nn.Module,
    batch: TokenBatch,
    hookpoint: str,
    replace: Callable[[Tensor], Tensor] | None,
    *,
    mask_token_id: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of one token batch with hidden states replaced.

    Args:
        model (`nn.Module`): a causal or masked language model in `eval` mode.
        batch ([`TokenBatch`]): tokens, on any device.
        hookpoint (`str`): where hidden states are replaced.
        replace (`Callable`, *optional*): maps hidden states at the kept positions, `[M, D]`, to what replaces them,
            `[M, D]`; `None` leaves the model as it is.
        mask_token_id (`int`, *optional*): id of the tokenizer's mask token, needed for masked language models.
        seed (`int`, *optional*, defaults to `0`): chooses the 15% of kept tokens that a masked model predicts, the
            same ones for every `replace`.

    Returns:
        `tuple[Tensor, Tensor]`: sum over predictions of the cross-entropy in nats (float64 scalar), and how many
        predictions there were (int64 scalar).

    Raises:
        `ValueError`: the model has no language-model head, `mask_token_id` is missing, or `replace` changed the shape.
    """
    logits, targets = spliced_logits(model, batch, hookpoint, replace, mask_token_id=mask_token_id, seed=seed)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, target_ids in zip(logits.split(_POSITIONS_AT_ONCE), targets.split(_POSITIONS_AT_ONCE), strict=True):
        total += F.cross_entropy(rows.float(), target_ids, reduction="none").double().sum()
    return total, torch.tensor(len(targets), device=logits.device)


def spliced_logits(
    model: nn.Module,
    batch: TokenBatch,
    hookpoint: str,
    replace: Callable[[Tensor], Tensor] | None,
    *,
    mask_token_id: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the logits where the model's loss is counted, with hidden states replaced, and the tokens to predict.

    Arguments and errors are those of [`spliced_losses`].

    Returns:
        `tuple[Tensor, Tensor]`: logits `[M, V]` at the M scored positions, in the model's type, and the tokens to
        predict `[M]`.
    """
    if not has_lm_loss(model):
        raise ValueError(f"{type(model).__name__} has no language-model head, so there is no loss to measure.")
    batch = batch.to(next(model.parameters()).device)
    input_ids, scored, targets = _task(model, batch, mask_token_id, seed)
    hooks = [] if replace is None else [(hookpoint, Splice(batch.keep, replace))]
    with hooked(model, hooks), torch.no_grad():
        logits = run_model(model, input_ids, batch.attention_mask if batch.padded else None).logits
    return logits[scored.to(logits.device)], targets[scored].to(logits.device)


class Splice:
    """Puts new hidden states at the kept positions, the first time the module runs."""

    def __init__(self, keep: Tensor, replace: Callable[[Tensor], Tensor]) -> None:
        self.keep, self.replace, self.done = keep, replace, False

    def __call__(self, hookpoint: str, value: Any) -> Tensor | None:
        """Return a module's output with the kept positions replaced; `None` leaves it as it is."""
        if self.done:
            return None
        self.done = True
        states = first_tensor(value)
        if states is None or states.ndim != 3 or states.shape[:2] != self.keep.shape:
            raise ValueError(f"Hookpoint '{hookpoint}' does not carry hidden states [batch, sequence, width].")
        keep = self.keep.to(states.device)
        old = states[keep]
        new = self.replace(old)
        if new.shape != old.shape:
            raise ValueError(f"`replace` must keep the shape {list(old.shape)}, it gave {list(new.shape)}.")
        states = states.clone()  # another module may hold the same tensor as its residual stream
        states[keep] = new.to(states)
        return states


def _task(model: nn.Module, batch: TokenBatch, mask_token_id: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens to read, positions at which the model is scored, and the tokens to predict, all `[B, S]`."""
    if not is_masked_lm(model):
        scored = batch.keep.clone()
        scored[:, -1] = False
        scored[:, :-1] &= batch.attention_mask[:, 1:].bool()
        return batch.input_ids, scored, batch.input_ids.roll(-1, 1)
    if mask_token_id is None:
        raise ValueError(f"{type(model).__name__} is a masked language model: pass the tokenizer's `mask_token_id`.")
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(batch.keep.shape, generator=generator) < _MASKED_SHARE
    scored = batch.keep & masked.to(batch.keep.device)
    return batch.input_ids.masked_fill(scored, mask_token_id), scored, batch.input_ids
