"""Bussmann's `matryoshka_sae` and `BatchTopK` (`<name>_<step>/sae.pt`, `config.json`).

TopK, BatchTopK and Matryoshka SAEs there have a `b_enc` and never apply it: `a = relu((x - b_dec) W_enc)`, of which
those above `threshold` fire. ReLU ones apply it; JumpReLU ones too, but do not subtract `b_dec`. In the config
everything that is no number is a string, lists too.
"""

from typing import Any

import torch

from ...models import SAEModel
from ...models.configuration_sae import nearest
from ..assembly import assemble
from ..base import Format
from ..checkpoint import Checkpoint, cumulated, number_list
from ..hook_names import from_transformer_lens, hf_model_id, kept_with_warning


_ACTIVATIONS = {
    "vanilla": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
    "global-matryoshka-topk": "batch_topk",
}


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the config has the names of these repositories."""
    config = checkpoint.config
    return "act_size" in config and ("dict_size" in config or "group_sizes" in config)


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a checkpoint's folder."""
    config = checkpoint.config
    activation = _activation(checkpoint)
    b_dec, b_enc = checkpoint.vector("b_dec"), checkpoint.vector("b_enc")
    W_enc, W_dec = checkpoint.matrices("W_enc", "W_dec", (len(b_enc), len(b_dec)), transposed=(True, False))
    extra: dict[str, Any] = {}
    if activation == "jumprelu":
        extra["threshold"] = checkpoint.vector("jumprelu.log_threshold", length=len(b_enc)).exp()
    if activation == "batch_topk":
        extra["threshold"] = checkpoint.scalar("threshold")
    model = hf_model_id(checkpoint.hints.base_model or config.get("model_name"))
    hook = config.get("hook_point")
    return assemble(
        checkpoint,
        activation,
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc if activation in ("relu", "jumprelu") else torch.zeros_like(b_enc),
        b_dec=b_dec,
        k=config.get("top_k"),
        prefix_widths=_widths(checkpoint),
        apply_b_dec_to_input=activation != "jumprelu",
        input_normalization="layer_norm" if config.get("input_unit_norm") in (True, "True") else None,
        base_model=model,
        hookpoint=checkpoint.hints.hookpoint
        or kept_with_warning(hook, from_transformer_lens(hook, model) if hook else None, model),
        **extra,
    )


def _activation(checkpoint: Checkpoint) -> str:
    kind = checkpoint.config.get("sae_type")
    if kind is None:
        if checkpoint.has("jumprelu.log_threshold"):
            return "jumprelu"
        return "batch_topk" if checkpoint.has("threshold") else "topk"
    if kind not in _ACTIVATIONS:
        raise ValueError(f"{checkpoint.name} has the sae_type {kind!r}, not known here.{nearest(kind, _ACTIVATIONS)}")
    return _ACTIVATIONS[kind]


def _widths(checkpoint: Checkpoint) -> list[int] | None:
    """Return the prefix widths of a Matryoshka SAE; others have groups in their config that they do not use."""
    config = checkpoint.config
    nested = config.get("sae_type", "global-matryoshka-topk") == "global-matryoshka-topk"
    return cumulated(number_list(config.get("group_sizes"))) if nested else None


FORMAT = Format("bussmann", claims, read)
