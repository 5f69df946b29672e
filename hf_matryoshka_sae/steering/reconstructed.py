"""A text with its hidden states reconstructed by an SAE: the loss of each token, and the continuation.

At the hookpoint the hidden states are replaced by their reconstructions, at every token but special ones and the
first, which keep theirs as in the evaluation (see `evaluation.language_model`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import TokenBatch, harvest, resolve_hookpoints, spliced_logits
from ..activations.hookpoints import hooked
from ..common.token_text import token_texts
from ..features.continuing import Reconstructing, continued, prompt_tokens
from ..features.text import longest, own_hookpoint, read_text
from ..models import SAEModel


@dataclass(frozen=True)
class ReconstructedText:
    """A text's loss and continuation, with and without reconstructed hidden states.

    Args:
        tokens (`list[str]`): The text of each of the T tokens; text, not markup.
        read (`Tensor` of shape `(T,)`): bool; `True` where hidden states were replaced.
        loss (`Tensor` of shape `(T,)`): Cross-entropy of each token in nats, of the unchanged model; NaN where the
            token is not predicted from a replaced state.
        spliced_loss (`Tensor` of shape `(T,)`): The same cross-entropy with reconstructions.
        fvu (`float`, *optional*): Squared error of the reconstructions over the variance of the text's hidden states;
            `None` with fewer than two of them.
        l0 (`float`): Mean number of latents that fire on a token; 0 where no token is read.
        left_out (`int`): Number of tokens cut off at the end of the text.
        plain (`str`): Continuation of the unchanged model.
        spliced (`str`): Continuation with reconstructions.
    """

    tokens: list[str]
    read: Tensor
    loss: Tensor
    spliced_loss: Tensor
    fvu: float | None
    l0: float
    left_out: int
    plain: str
    spliced: str


@torch.no_grad()
def reconstruct_text(
    sae: SAEModel,
    model: nn.Module,
    tokenizer: Any,
    text: str,
    width: int | None = None,
    hookpoint: str | None = None,
    max_new_tokens: int = 20,
    max_tokens: int = 512,
) -> ReconstructedText:
    """Replace a text's hidden states by their reconstructions; return the loss of each token and the continuation.

    Args:
        sae ([`SAEModel`]): The SAE, encoded as at inference.
        model (`nn.Module`): A causal language model, in `eval` mode.
        tokenizer: The language model's tokenizer.
        text (`str`): Any text.
        width (`int`, *optional*): Encode with the first `width` latents alone; all by default.
        hookpoint (`str`, *optional*): Module whose output is replaced; by default the one in the SAE's config.
        max_new_tokens (`int`, *optional*, defaults to 20): Largest number of new tokens; 0 for no continuation.
        max_tokens (`int`, *optional*, defaults to 512): A text with more tokens is cut off there, and `left_out` says
            so. It is cut earlier where the model could not read it together with the new tokens.

    Raises:
        `ValueError`: if the text is empty, or the model predicts no next tokens or has no such hookpoint.
    """
    if max_tokens < 1 or max_new_tokens < 0:
        raise ValueError(f"Expected `max_tokens` >= 1 and `max_new_tokens` >= 0, got {max_tokens}, {max_new_tokens}.")
    if max_new_tokens and not model.can_generate():
        raise ValueError(f"{type(model).__name__} generates no text: a causal language model is needed.")
    sae = sae if width is None else sae.truncate(width)
    sae = copy.deepcopy(sae).eval() if sae.training else sae
    (hookpoint,) = resolve_hookpoints(model, [own_hookpoint(sae, hookpoint)])
    room = longest(model) - max_new_tokens
    batch, left_out = read_text(tokenizer, text, min(max_tokens, room))
    batch = batch.to(next(model.parameters()).device)
    states = harvest(model, batch.input_ids, batch.attention_mask, [hookpoint])[hookpoint][batch.keep].float()
    output = sae(states.to(sae.W_enc))
    error = (output.reconstruction.to(states) - states).square().sum()
    variance = (states - states.mean(0)).square().sum()
    loss, spliced_loss = (_losses(model, batch, hookpoint, replace) for replace in (None, _reconstruction(sae)))
    plain = spliced = ""
    if max_new_tokens:
        ids = batch.input_ids if left_out else prompt_tokens(tokenizer, text, room).to(batch.input_ids)
        plain = _text(tokenizer, continued(model, tokenizer, ids, max_new_tokens)[0])
        keep = batch.keep[:, : ids.shape[1]]
        with hooked(model, [(hookpoint, Reconstructing(_reconstruction(sae), keep))]):
            spliced = _text(tokenizer, continued(model, tokenizer, ids, max_new_tokens)[0])
    return ReconstructedText(
        tokens=token_texts(tokenizer, batch.input_ids[0].tolist()),
        read=batch.keep[0].cpu(),
        loss=loss,
        spliced_loss=spliced_loss,
        fvu=float(error / variance) if float(variance) > 0 else None,
        l0=float((output.latents.values > 0).sum()) / max(1, len(states)),
        left_out=left_out,
        plain=plain,
        spliced=spliced,
    )


def _reconstruction(sae: SAEModel) -> Callable[[Tensor], Tensor]:
    return lambda x: sae(x.to(sae.W_enc)).reconstruction.to(x)


def _losses(model: nn.Module, batch: TokenBatch, hookpoint: str, replace: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Compute the cross-entropy `(T,)` of each token that a replaced position predicts, NaN elsewhere."""
    logits, targets = spliced_logits(model, batch, hookpoint, replace)
    losses = torch.full((batch.input_ids.shape[1],), torch.nan)
    places = batch.keep[0, :-1].nonzero().flatten().cpu() + 1
    losses[places] = F.cross_entropy(logits.float(), targets, reduction="none").cpu()
    return losses


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)
