"""OpenAI's sparse autoencoders of GPT-2 small (`<layer>.pt`, Gao et al. 2024, arXiv 2406.04093).

`pre_bias` is subtracted from the input. Version 5 is TopK and normalises each hidden state; versions 1 and 4 are ReLU
and do not. The file does not say whether it does: the activation decides, as in the library that wrote it.
"""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ...models import SAEModel
from ...models.saving import staged_files
from ..assembly import assemble, cpu_tensors, plain
from ..base import Format, first_objection
from ..checkpoint import Checkpoint, quoted
from ..hook_names import LAYOUTS


_MODEL = "openai-community/gpt2"
_SITES = {
    "resid_delta_attn": "attn",
    "resid_delta_mlp": "mlp",
    "resid_post_attn": "ln_2:input",
    "resid_post_mlp": "",
    "mlp_post_act": "mlp.c_proj:input",
}


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the biases have OpenAI's names; those of CSR have a config."""
    return checkpoint.has("pre_bias", "latent_bias")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of one file."""
    b_enc, b_dec = checkpoint.vector("latent_bias"), checkpoint.vector("pre_bias")
    tied = checkpoint.has("decoder.linear.weight")  # the encoder's own matrix, by another name
    decoder = "decoder.linear.weight" if tied else "decoder.weight"
    W_enc, W_dec = checkpoint.matrices(
        "encoder.weight", decoder, (len(b_enc), len(b_dec)), transposed=(False, not tied)
    )
    activation = checkpoint.values.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise ValueError(
            f"{checkpoint.name} has the activation {quoted(activation)}; what is known is 'ReLU' and 'TopK'."
        )
    extra: dict[str, Any] = {}
    if activation == "TopK":
        state = checkpoint.values.get("activation_state_dict") or {}
        if not isinstance(state, dict):
            raise ValueError(f"activation_state_dict of {checkpoint.name} should be a dictionary, is {quoted(state)}.")
        after = state.get("postact_fn", "ReLU")
        if after != "ReLU":
            raise ValueError(f"{checkpoint.name} applies {quoted(after)} after TopK; an SAE here applies a ReLU.")
        extra = {"k": state.get("k", checkpoint.values.get("activation.k")), "input_normalization": "layer_norm"}
    return assemble(
        checkpoint,
        "relu" if activation == "ReLU" else "topk",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        **_places(checkpoint),
        **extra,
    )


def _places(checkpoint: Checkpoint) -> dict[str, str]:
    """Return model and hookpoint from a path such as `gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt`."""
    match = re.search(r"gpt2-small/([a-z_]+?)(_v\d+.*)?/autoencoders/(\d+)\.pt$", checkpoint.name)
    if match is None or match[1] not in _SITES:
        return {}
    site = _SITES[match[1]]
    layer = LAYOUTS["gpt2"].layer(match[3])
    return {"base_model": _MODEL, "hookpoint": f"{layer}.{site}" if site else layer}


def objection(sae: SAEModel) -> str | None:
    """Return why OpenAI's autoencoder cannot compute this; `None` where it can."""
    config, activation = sae.config, sae.config.activation_name
    return first_objection(
        (activation not in ("relu", "topk"), f"its autoencoders are ReLU or TopK, and this SAE is {activation}"),
        (hasattr(config, "prefix_widths"), "it has no place for prefix widths"),
        (config.output_hookpoint is not None, "it does not say that an SAE is a transcoder"),
        (getattr(config, "group_size", None) is not None, "it has no activation that keeps the largest of each group"),
        (activation == "topk" and config.input_normalization != "layer_norm",
         "its TopK autoencoders normalise each hidden state (layer_norm), and this SAE does not"),
        (activation == "relu" and config.input_normalization is not None,
         "its ReLU autoencoders do not normalise each hidden state, and this SAE does"),
    )  # fmt: skip


def write(sae: SAEModel, path: Path) -> None:
    """Write one file: `path` itself where that ends in `.pt`, else `<layer>.pt` or `autoencoder.pt` in it."""
    sae = plain(sae, subtracts=True)
    tensors, num_latents = cpu_tensors(sae), sae.config.num_latents
    is_topk = sae.config.activation_name == "topk"
    content = {
        "pre_bias": tensors["b_dec"],
        "latent_bias": tensors["b_enc"],
        "stats_last_nonzero": torch.zeros(num_latents, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(num_latents),
        "latents_mean_square": torch.zeros(num_latents),
        "encoder.weight": tensors["W_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "activation": "TopK" if is_topk else "ReLU",
        "activation_state_dict": OrderedDict(k=int(sae.config.k), postact_fn="ReLU") if is_topk else OrderedDict(),
    }
    layer = re.search(r"\.(\d+)(\.|:|$)", sae.config.hookpoint or "")
    name = path.name if path.suffix == ".pt" else f"{layer[1]}.pt" if layer else "autoencoder.pt"
    with staged_files(path.parent if path.suffix == ".pt" else path, keep_others=True, last=name) as staging:
        torch.save(content, staging / name)


FORMAT = Format("openai", claims, read, objection, write)
