"""Which tokens a latent makes more or less likely, through the final norm and the unembedding.

    effect of latent i on token v = (d_i * g) . u_v

d is the decoder row, g the gain of the language model's final norm, u the row of the unembedding; biases are the same
for all latents and play no part. What the norm divides by depends on the whole hidden state. It is a positive factor
common to all tokens, and is left out: effects have the order of those in the logits, and no unit. A LayerNorm
also takes off the mean of its input, which is linear, so the mean of d is taken off.

The norm is found by running the model, not by its name, and its gain by asking it, so that it does not matter
whether the gain is `weight` or `1 + weight`.

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
    """The tokens on which latents act most, by latent.

    Args:
        promoted (`Tensor` of shape `(F, n)`): Token ids, largest effect first.
        promoted_logits (`Tensor` of shape `(F, n)`): Their effects, float32.
        suppressed (`Tensor` of shape `(F, n)`), suppressed_logits (`Tensor` of shape `(F, n)`): The same from the
            other end, most negative first.
    """

    promoted: Tensor
    promoted_logits: Tensor
    suppressed: Tensor
    suppressed_logits: Tensor


@torch.no_grad()
def logit_effects(sae: SAEModel, model: nn.Module, count: int = 10) -> LogitEffects:
    """The tokens that each latent promotes and suppresses most.

    Args:
        sae ([`SAEModel`]): Its decoder rows point into the hidden states that the final norm sees.
        model (`nn.Module`): A transformers model with an unembedding.
        count (`int`, *optional*, defaults to 10): Tokens of either kind.

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
    """Decoder rows after the final norm, `(F, D)`: their products with rows of the unembedding are the effects."""
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
    """The module whose output the unembedding takes, where that is a norm; found by running two tokens."""
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
        if head_inputs and first_tensor(output).shape == head_inputs[-1].shape and torch.equal(first_tensor(output), head_inputs[-1]):
            return module
    return None


def norm_gain(norm: nn.Module, width: int) -> tuple[Tensor, bool]:
    """The gain `(D,)` of a norm in float32, and whether it takes off the mean of its input.

    Half the difference between what it makes of x and of -x has no bias in it; x has mean 0 and mean square 1, so
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
