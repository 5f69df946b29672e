"""A text as an SAE leaves it: what the language model loses on each token, and how it goes on.

At the hookpoint the hidden states are replaced by their reconstructions, at every token but special ones and the
first, which keep theirs as in the evaluation (see `evaluation.language_model`).
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import TokenBatch, harvest, resolve_hookpoints, spliced_logits
from ..activations.hookpoints import first_tensor, hooked
from ..common.token_text import token_texts
from ..features.text import longest, own_hookpoint, read_text
from ..models import SAEModel
from .continuation import continued, prompt_tokens


@dataclass(frozen=True)
class ReconstructedText:
    """What reconstructions change of a text.

    Args:
        tokens (`list[str]`): The text of each of the T tokens; text, not markup.
        read (`Tensor` of shape `(T,)`): bool; where hidden states were replaced.
        loss (`Tensor` of shape `(T,)`), spliced_loss (`Tensor` of shape `(T,)`): Cross-entropy of each token in nats,
            of the model as it is and with reconstructions; NaN where it is not predicted from a replaced state.
        fvu (`float`, *optional*): Squared error of the reconstructions over the variance of the text's hidden states;
            `None` with fewer than two.
        l0 (`float`): Latents that fire per token; 0 where no token is read.
        left_out (`int`): Tokens at the end of the text that were too many.
        plain (`str`), spliced (`str`): How the model goes on, as it is and with reconstructions.
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
    tokenizer,
    text: str,
    width: int | None = None,
    hookpoint: str | None = None,
    max_new_tokens: int = 20,
    max_tokens: int = 512,
) -> ReconstructedText:
    """Read a text with its hidden states reconstructed, and let the model go on.

    Args:
        sae ([`SAEModel`]): Used as it is at inference.
        model (`nn.Module`): A causal language model, in `eval` mode.
        tokenizer: Its tokenizer.
        text (`str`): Any text.
        width (`int`, *optional*): Only the first `width` latents, encoded alone.
        hookpoint (`str`, *optional*): Where; by default what the SAE's config says.
        max_new_tokens (`int`, *optional*, defaults to 20): Length of the continuations, at most; 0 for none.
        max_tokens (`int`, *optional*, defaults to 512): A longer text is cut there; `left_out` says so. It is cut
            further where the model could not read it with the new tokens.

    Returns:
        [`ReconstructedText`].

    Raises:
        `ValueError`: if the text is empty, or the model predicts no next tokens or has no such hookpoint.
    """
    if max_tokens < 1 or max_new_tokens < 0:
        raise ValueError(f"Expected `max_tokens` >= 1 and `max_new_tokens` >= 0, got {max_tokens}, {max_new_tokens}.")
    if max_new_tokens and not model.can_generate():
        raise ValueError(f"{type(model).__name__} continues no text: a causal language model is needed.")
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
        plain = _text(tokenizer, continued(model, tokenizer, ids, max_new_tokens, 0.0, 0))
        keep = batch.keep[:, : ids.shape[1]]
        with hooked(model, [(hookpoint, _Reconstructing(_reconstruction(sae), keep))]):
            spliced = _text(tokenizer, continued(model, tokenizer, ids, max_new_tokens, 0.0, 0))
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


def _reconstruction(sae: SAEModel):
    return lambda x: sae(x.to(sae.W_enc)).reconstruction.to(x)


def _losses(model: nn.Module, batch: TokenBatch, hookpoint: str, replace) -> Tensor:
    """Cross-entropy `(T,)` of each token that a replaced position predicts, NaN elsewhere."""
    logits, targets = spliced_logits(model, batch, hookpoint, replace)
    found = torch.full((batch.input_ids.shape[1],), torch.nan)
    places = batch.keep[0, :-1].nonzero().flatten().cpu() + 1
    found[places] = F.cross_entropy(logits.float(), targets, reduction="none").cpu()
    return found


class _Reconstructing:
    """Replaces hidden states while text is generated: those of the prompt that are read, and every new one."""

    def __init__(self, replace, keep: Tensor) -> None:
        self.replace, self.keep, self.started = replace, keep, False

    def __call__(self, hookpoint: str, value) -> Tensor | None:
        states = first_tensor(value)
        if states is None or states.ndim != 3:
            raise ValueError(f"Hookpoint '{hookpoint}' does not carry hidden states [batch, sequence, width].")
        keep = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        # The prompt comes in one piece (again and again where the model keeps no cache), new tokens one by one.
        if not self.started or states.shape[1] > 1:
            keep[:, : self.keep.shape[1]] = self.keep.to(keep.device)
        self.started = True
        states = states.clone()
        states[keep] = self.replace(states[keep])
        return states


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)
