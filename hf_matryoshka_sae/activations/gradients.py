"""The gradient of the language model's loss with respect to its hidden states at a hookpoint."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hookpoints import first_tensor, hooked, run_model
from .splice import _task, has_lm_loss
from .text.tokens import TokenBatch


def loss_gradients(
    model: nn.Module, batch: TokenBatch, hookpoint: str, *, mask_token_id: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return hidden states of one token batch, and the gradient of the summed cross-entropy with respect to them.

    The loss is the one [`spliced_losses`] counts. A latent's attribution is its value times the gradient along its
    decoder row (attribution patching, Syed et al. 2023, arXiv 2310.10348; with the SAE's error kept, Marks et al.
    2024, arXiv 2403.19647).

    Args:
        model (`nn.Module`): a causal or masked language model in `eval` mode; its parameters get no gradient.
        batch ([`TokenBatch`]): tokens, on any device.
        hookpoint (`str`): where hidden states are read.
        mask_token_id (`int`, *optional*): id of the tokenizer's mask token, needed for masked language models.
        seed (`int`, *optional*, defaults to `0`): chooses the tokens that a masked model predicts.

    Returns:
        `tuple[Tensor, Tensor]`: states and gradients at the kept positions, `[M, D]` each, float32 (nats per unit of
        the hidden state). A position no later prediction depends on has gradient 0.

    Raises:
        `ValueError`: the model has no language-model head, `mask_token_id` is missing, or the forward pass does not
            reach the hookpoint, or the loss does not depend on it.
    """
    if not has_lm_loss(model):
        raise ValueError(f"{type(model).__name__} has no language-model head, so there is no loss to differentiate.")
    batch = batch.to(next(model.parameters()).device)
    input_ids, scored, targets = _task(model, batch, mask_token_id, seed)
    leaf = _Leaf(batch.keep)
    with torch.enable_grad():
        with hooked(model, [(hookpoint, leaf)]):
            logits = run_model(model, input_ids, batch.attention_mask if batch.padded else None).logits
        if leaf.states is None:
            raise ValueError(f"The forward pass of {type(model).__name__} never reached {hookpoint}.")
        target_ids = targets[scored].to(logits.device)
        loss = F.cross_entropy(logits[scored.to(logits.device)].float(), target_ids, reduction="sum")
        gradient = _gradient(loss, leaf.states, hookpoint)
    keep = batch.keep.to(gradient.device)
    return leaf.states.detach()[keep].float(), gradient[keep].float()


class _Leaf:
    """Cuts the graph where the hidden states are, so that only what lies behind the hookpoint is differentiated."""

    def __init__(self, keep: Tensor) -> None:
        self.shape, self.states = keep.shape, None

    def __call__(self, hookpoint: str, value: Any) -> Tensor | None:
        if self.states is not None:
            return None
        states = first_tensor(value)
        if states is None or states.ndim != 3 or states.shape[:2] != self.shape:
            raise ValueError(f"Hookpoint '{hookpoint}' does not carry hidden states [batch, sequence, width].")
        self.states = states.detach().requires_grad_()
        return self.states


def _gradient(loss: Tensor, states: Tensor, hookpoint: str) -> Tensor:
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, states, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError(f"The loss does not depend on the hidden states at '{hookpoint}'. Choose a layer of the model.")
