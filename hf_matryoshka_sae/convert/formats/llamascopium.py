"""llamascopium, of the authors of Llama Scope (`config.json`, `sae_weights.safetensors`).

    pre = x W_E + b_E,  a = act(pre ||d_i||) / ||d_i||  (the norms where `sparsity_include_decoder_norm`),  a W_D + b_D

Latents of TopK SAEs are measured in units of their contribution `a ||d_i||`, in which they are selected.
"""

from typing import Any

import torch

from ...models import SAEModel
from ..assembly import assemble
from ..base import Format
from ..checkpoint import Checkpoint
from ..hook_names import hf_model_id
from .llama_scope import fold_dataset_norm, jumprelu_threshold, places


_TYPES = ("sae", "transcoder")
_NORMS = {"token-wise": "constant_norm", "dataset-wise": None, "inference": None}


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the matrices have the library's names."""
    return checkpoint.has("W_E", "W_D")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a folder."""
    config = checkpoint.config
    activation = str(config.get("act_fn", "relu")).lower()
    norm = config.get("norm_activation", "dataset-wise")
    _refuse_other_maths(checkpoint, activation, norm)
    b_enc, has_bias = checkpoint.vector("b_E"), config.get("use_decoder_bias", True) and checkpoint.has("b_D")
    d_in = config.get("d_model")
    if d_in not in (shape := checkpoint.tensor("W_D").shape):  # of which one is D
        d_in = shape[-1] if shape else 0
    b_dec = checkpoint.vector("b_D") if has_bias else torch.zeros(d_in)
    W_enc, W_dec = checkpoint.matrices("W_E", "W_D", (len(b_enc), len(b_dec)), transposed=(True, False))
    extra: dict[str, Any] = {"k": config.get("top_k")} if activation == "topk" else {}
    if activation == "jumprelu":
        extra["threshold"] = jumprelu_threshold(checkpoint, W_dec)
    model = hf_model_id(checkpoint.hints.base_model or config.get("model_name"))
    sae = assemble(
        checkpoint,
        activation,
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        apply_b_dec_to_input=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        scale_by_decoder_norm=activation == "topk" and bool(config.get("sparsity_include_decoder_norm", True)),
        input_normalization=_NORMS[norm],
        base_model=model,
        **places(checkpoint, model),
        **extra,
    )
    if norm == "dataset-wise":
        fold_dataset_norm(sae, *_dataset_norms(checkpoint))
    return sae


def _refuse_other_maths(checkpoint: Checkpoint, activation: str, norm: str) -> None:
    config = checkpoint.config
    kind = config.get("sae_type", "sae")
    for what, value, known in (
        ("sae_type", kind, _TYPES),
        ("act_fn", activation, ("relu", "jumprelu", "topk")),
        ("norm_activation", norm, tuple(_NORMS)),
    ):
        if value not in known:
            raise ValueError(f"{checkpoint.name} has {what} {value!r}; what is read is {', '.join(known)}.")
    if config.get("use_glu_encoder"):
        raise ValueError(f"{checkpoint.name} multiplies its latents by a second encoder's, which no SAE here does.")
    if config.get("hook_point_out") not in (None, config.get("hook_point_in")) and norm == "token-wise":
        raise ValueError(f"{checkpoint.name} is a transcoder whose input and output are normalised one by one.")


def _dataset_norms(checkpoint: Checkpoint) -> tuple[float, float]:
    config = checkpoint.config
    inside = config.get("hook_point_in")
    outside = config.get("hook_point_out") or inside
    name = "dataset_average_activation_norm"
    return (
        checkpoint.positive(f"{name}.{inside}", f"{name}.in"),
        checkpoint.positive(f"{name}.{outside}", f"{name}.out"),
    )


FORMAT = Format("llamascopium", claims, read)
