"""SAEs in `config.json` and `model.safetensors` that are no transformers models: mlsae; sentence-transformers' CSR.

Both are TopK, subtract a bias from the input, and may normalise each input. mlsae (Lawson et al. 2024) has one SAE for
the residual streams of all layers and no bias of the latents. CSR (Wen et al. 2025) reads sentence embeddings; its
decoder is its encoder transposed, of which saving keeps one under either name.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...models import SAEModel
from ...models.saving import staged_files
from ..assembly import assemble, cpu_tensors, plain, write_json
from ..base import Format, first_objection
from ..checkpoint import Checkpoint


def claims_mlsae(checkpoint: Checkpoint) -> bool:
    """Return whether mlsae's bias is there."""
    return checkpoint.has("pre_encoder_bias", "encoder.weight", "decoder.weight")


def read_mlsae(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a repository of mlsae."""
    b_dec, config = checkpoint.vector("pre_encoder_bias"), checkpoint.config
    num_latents = config.get("n_latents") or max(checkpoint.tensor("encoder.weight").shape, default=0)
    W_enc, W_dec = checkpoint.matrices(
        "encoder.weight", "decoder.weight", (num_latents, len(b_dec)), transposed=(False, True)
    )
    return assemble(
        checkpoint,
        "topk",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=torch.zeros(num_latents),
        b_dec=b_dec,
        k=config.get("k"),
        input_normalization="layer_norm" if config.get("standardize", True) else None,
    )


def claims_csr(checkpoint: Checkpoint) -> bool:
    """Return whether the biases are there, and the config has CSR's sizes."""
    return checkpoint.has("pre_bias", "latent_bias") and {"input_dim", "hidden_dim"} <= checkpoint.config.keys()


def read_csr(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of a `SparseAutoEncoder` module's folder."""
    b_enc, b_dec = checkpoint.vector("latent_bias"), checkpoint.vector("pre_bias")
    shape = (len(b_enc), len(b_dec))
    encoder = checkpoint.matrix("encoder.weight", "decoder.linear.weight", shape=shape, transposed=False)
    extra: dict[str, Any] = {"k": checkpoint.config.get("k")}
    if checkpoint.config.get("normalize"):
        extra["input_normalization"] = "layer_norm"
    return assemble(checkpoint, "topk", W_enc=encoder, W_dec=encoder, b_enc=b_enc, b_dec=b_dec, **extra)


def objection_csr(sae: SAEModel) -> str | None:
    """Return why CSR's module cannot compute this; `None` where it can."""
    config = sae.config
    return first_objection(
        (config.activation_name != "topk", f"CSR is TopK, and this SAE is {config.activation_name}"),
        (hasattr(config, "prefix_widths"), "it has no place for prefix widths"),
        (config.output_hookpoint is not None, "it does not say that an SAE is a transcoder"),
        (getattr(config, "group_size", None) is not None, "it has no activation that keeps the largest of each group"),
        (config.input_normalization not in (None, "layer_norm"),
         f"it does not know the normalisation {config.input_normalization} of each input"),
        (not torch.equal(*(getattr(plain(sae, subtracts=True), name).float() for name in ("W_enc", "W_dec"))),
         "its decoder is its encoder transposed, and this SAE's are two matrices"),
    )  # fmt: skip


def write_csr(sae: SAEModel, path: Path) -> None:
    """Write `config.json` and `model.safetensors` of a `SparseAutoEncoder` module into a folder."""
    sae = plain(sae, subtracts=True)
    tensors, config = cpu_tensors(sae), sae.config
    state = {"encoder.weight": tensors["W_enc"], "latent_bias": tensors["b_enc"], "pre_bias": tensors["b_dec"]}
    state["stats_last_nonzero"] = torch.zeros(config.num_latents, dtype=torch.int64)
    content = {
        "input_dim": config.d_in,
        "hidden_dim": config.num_latents,
        "k": int(config.k),
        "k_aux": min(512, config.num_latents),
        "normalize": config.input_normalization == "layer_norm",
        "dead_threshold": 30,
    }
    with staged_files(path, keep_others=True, last="config.json") as staging:
        save_file(state, staging / "model.safetensors")
        write_json(staging / "config.json", content)


MLSAE = Format("mlsae", claims_mlsae, read_mlsae)
CSR = Format("csr", claims_csr, read_csr, objection_csr, write_csr)
