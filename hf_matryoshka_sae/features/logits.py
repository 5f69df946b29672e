"""Which tokens a latent makes more or less likely, through the final norm and the unembedding.

    effect of latent i on token v = (d_i * g) . u_v

d is the decoder row, g the gain of the language model's final norm, u the row of the unembedding; biases are the same
for all latents and play no part. What the norm divides by depends on the whole hidden state. It is a positive factor
common to all tokens, and is left out: effects have the order of those in the logits, and no unit. A LayerNorm
also takes off the mean of its input, which is linear, so the mean of d is taken off.

The norm is identified by running the model, not by its name, and its gain is measured on probes, so that it does not
matter whether the gain is `weight` or `1 + weight`.

Shapes: D width, V vocabulary, F latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..activations.hookpoints import first_tensor, run_model
from ..models import SAEModel
from ..progressive.statistics import decoder_rows


_ENTRIES_AT_ONCE = 2**24


@dataclass
class LogitEffects:
    """The tokens whose logits each latent changes most.

    Args:
        promoted (`Tensor` of shape `(F, n)`): Token ids, largest effect first.
        promoted_logits (`Tensor` of shape `(F, n)`): Effects on the logits of promoted tokens, float32.
        suppressed (`Tensor` of shape `(F, n)`): Token ids, most negative effect first.
        suppressed_logits (`Tensor` of shape `(F, n)`): Effects on the logits of suppressed tokens, float32.
    """

    promoted: Tensor
    promoted_logits: Tensor
    suppressed: Tensor
    suppressed_logits: Tensor


@torch.no_grad()
def logit_effects(sae: SAEModel, model: nn.Module, count: int = 10) -> LogitEffects:
    """Return the tokens that each latent promotes and suppresses most.

    Args:
        sae ([`SAEModel`]): SAE whose decoder rows point into the hidden states that the final norm takes.
        model (`nn.Module`): A transformers model with an unembedding.
        count (`int`, *optional*, defaults to 10): Number of promoted tokens, and of suppressed ones.

    Raises:
        `ValueError`: if the model has no unembedding that hidden states of the SAE's width go through.
    """
    directions = effect_directions(sae, model)
    unembedding = model.get_output_embeddings().weight.detach().to(directions)
    count = min(count, len(unembedding))
    parts = []
    for rows in directions.split(max(1, _ENTRIES_AT_ONCE // len(unembedding))):
        effects = rows @ unembedding.T
        ends = (effects.topk(count, dim=1), effects.topk(count, dim=1, largest=False))
        parts.append([part.cpu() for end in ends for part in (end.indices, end.values)])
    return LogitEffects(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@torch.no_grad()
def effect_directions(sae: SAEModel, model: nn.Module) -> Tensor:
    """Return decoder rows after the final norm, `(F, D)`; products with rows of the unembedding are the effects."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kind = type(model).__name__
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError(f"{kind} has no unembedding: it predicts no tokens.")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        raise ValueError(f"Between hidden states and unembedding {kind} has a head that is not linear.")
    rows, width = decoder_rows(sae), head.weight.shape[1]
    if rows.shape[1] != width:
        raise ValueError(f"The unembedding takes hidden states of width {width}, the SAE's have {rows.shape[1]}.")
    norm = final_norm(model)
    if norm is None:
        return rows.to(head.weight.device)
    gain, centres = norm_gain(norm, width)
    rows = rows.to(gain.device)
    return (rows - rows.mean(1, keepdim=True) if centres else rows) * gain


def final_norm(model: nn.Module) -> nn.Module | None:
    """Return the norm whose output the unembedding takes, identified by running two tokens; `None` without one."""
    head = model.get_output_embeddings()
    outputs: list[tuple[nn.Module, Tensor]] = []
    head_inputs: list[Tensor] = []
    handles = [head.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))]
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and name:
            handles.append(
                module.register_forward_hook(
                    lambda module, _, output: (
                        outputs.append((module, output)) if first_tensor(output) is not None else None
                    )
                )
            )
    try:
        run_model(model, torch.zeros(1, 2, dtype=torch.long, device=head.weight.device), None)
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(outputs):
        if (
            head_inputs
            and first_tensor(output).shape == head_inputs[-1].shape
            and torch.equal(first_tensor(output), head_inputs[-1])
        ):
            return module
    return None


def norm_gain(norm: nn.Module, width: int) -> tuple[Tensor, bool]:
    """Return the gain `(D,)` of a norm in float32, and whether the norm subtracts the mean of its input.

    Half the difference between its outputs for x and for -x is free of its bias; x has mean 0 and mean square 1, so
    that every kind of norm divides it by 1.
    """
    parameter = next(norm.parameters(), torch.zeros(()))
    probe = torch.ones(width, dtype=torch.float32, device=parameter.device)
    probe[1::2] = -1
    if width % 2:
        probe[-3:] = probe.new_tensor([1.0, 1.0, -2.0]) if width > 1 else 1.0
        probe /= probe.square().mean().sqrt()

    def odd_part(x: Tensor) -> Tensor:
        x = x.to(parameter.dtype).expand(1, 1, -1)
        return (first_tensor(norm(x)) - first_tensor(norm(-x))).float().flatten() / 2

    gain = odd_part(probe) / probe
    constant = odd_part(torch.ones_like(probe))
    return gain, bool(constant.abs().max() < 0.5 * gain.abs().max())
