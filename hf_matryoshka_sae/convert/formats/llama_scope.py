"""Llama Scope (`hyperparams.json`, `checkpoints/final.safetensors`; He et al. 2024) and its R1-Distill variant.

Hidden states are scaled by sqrt(D) / their average length. That is folded into both biases and the threshold, as the
library's own "inference" form has it: the SAE takes raw hidden states and its latents are in their units. `b_dec` is
not subtracted from the input unless the config says so.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ...models import SAEModel
from ..assembly import assemble
from ..base import Format
from ..checkpoint import Checkpoint
from ..hook_names import from_transformer_lens, kept_with_warning


logger = logging.getLogger(__name__)

_MODEL = "meta-llama/Llama-3.1-8B"


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether linear layers come with a threshold that the config or the tensors name."""
    named = "jump_relu_threshold" in checkpoint.config or checkpoint.has("log_jumprelu_threshold")
    return named and checkpoint.has("encoder.weight", "decoder.weight")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of one layer's folder."""
    config = checkpoint.config
    activation = str(config.get("act_fn", "jumprelu")).lower()
    if activation not in ("jumprelu", "relu", "topk"):
        raise ValueError(
            f"{checkpoint.name} has act_fn {activation!r}; what is known is 'jumprelu', 'relu' and 'topk'."
        )
    norm = config.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        raise ValueError(
            f"{checkpoint.name} has norm_activation {norm!r}; what is read is 'dataset-wise' and 'inference'."
        )
    if config.get("use_glu_encoder"):
        raise ValueError(f"{checkpoint.name} multiplies its latents by a second encoder's, which no SAE here does.")
    b_enc, b_dec = checkpoint.vector("encoder.bias"), checkpoint.vector("decoder.bias")
    W_enc, W_dec = checkpoint.matrices(
        "encoder.weight", "decoder.weight", (len(b_enc), len(b_dec)), transposed=(False, True)
    )
    extra: dict[str, Any] = {}
    if activation == "jumprelu":
        extra["threshold"] = jumprelu_threshold(checkpoint, W_dec)
    model = checkpoint.hints.base_model or config.get("model_name") or _MODEL
    sae = assemble(
        checkpoint,
        activation,
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        k=config.get("top_k") if activation == "topk" else None,
        apply_b_dec_to_input=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        scale_by_decoder_norm=activation == "topk" and bool(config.get("sparsity_include_decoder_norm")),
        base_model=model,
        **places(checkpoint, model),
        **extra,
    )
    norms = config.get("dataset_average_activation_norm") or {}
    if norm == "dataset-wise" and norms:
        lengths = norms.get("in"), norms.get("out", norms.get("in"))
        if not all(isinstance(length, int | float) and length > 0 for length in lengths):
            raise ValueError(
                f"`dataset_average_activation_norm` should have lengths `in` and `out` above 0, is {norms}."
            )
        fold_dataset_norm(sae, *lengths)
    elif norm == "dataset-wise":
        logger.warning(
            "%s was trained on hidden states times a factor which is not among its files: scale its input to an "
            "average length of sqrt(d_in).",
            checkpoint.name,
        )
    return sae


def jumprelu_threshold(checkpoint: Checkpoint, W_dec: Tensor) -> Tensor | float:
    """Return the threshold of the pre-activations; that of contributions is divided by the decoder's norms."""
    named = [name for name in checkpoint.tensors if name.endswith("log_jumprelu_threshold")]
    if named:
        threshold = checkpoint.tensor(named[0]).exp()
        if threshold.numel() not in (1, len(W_dec)):
            raise ValueError(f"{named[0]} of {checkpoint.name} should have {len(W_dec)} entries, has shape "
                             f"{tuple(threshold.shape)}.")  # fmt: skip
    else:
        threshold = checkpoint.config.get("jump_relu_threshold")
        if not isinstance(threshold, int | float):
            raise ValueError(
                f"{checkpoint.name} needs a number `jump_relu_threshold` in its config, has {threshold!r}."
            )
    if checkpoint.config.get("sparsity_include_decoder_norm"):
        threshold = threshold / W_dec.norm(dim=1)
    return threshold


def fold_dataset_norm(sae: SAEModel, norm_in: float, norm_out: float) -> None:
    """Make an SAE for hidden states of length sqrt(D) take raw ones, of average length `norm_in` (in place)."""
    sae.fold_normalization_(torch.zeros_like(sae.b_dec), norm_in / math.sqrt(sae.config.d_in))
    # A transcoder's outputs have another length than its inputs.
    sae.b_dec.data *= norm_out / norm_in
    sae.W_dec.data *= norm_out / norm_in


def places(checkpoint: Checkpoint, model: str | None) -> dict[str, str | None]:
    """Return hookpoints from the names of TransformerLens's hooks in the config."""
    config = checkpoint.config
    inside, outside = config.get("hook_point_in"), config.get("hook_point_out")
    hookpoints = {}
    if checkpoint.hints.hookpoint is None:
        hookpoints["hookpoint"] = kept_with_warning(
            inside, from_transformer_lens(inside, model) if inside else None, model
        )
    if outside is not None and outside != inside:
        hookpoints["output_hookpoint"] = kept_with_warning(outside, from_transformer_lens(outside, model), model)
    return hookpoints


FORMAT = Format("llama_scope", claims, read)
