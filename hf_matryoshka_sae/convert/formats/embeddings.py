"""SAEs in `config.json` and `model.safetensors` that are no transformers models: mlsae; sentence-transformers' CSR.

Both are TopK, subtract a bias from the input, and may normalise each input. mlsae (Lawson et al. 2024) has one SAE for
the residual streams of all layers and no bias of the latents. CSR (Wen et al. 2025) reads sentence embeddings; its
decoder is its encoder transposed, of which saving keeps one under either name.
"""

from typing import Any

import torch

from ...models import SAEModel
from ..assembly import assemble
from ..base import Format
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


MLSAE = Format("mlsae", claims_mlsae, read_mlsae)
CSR = Format("csr", claims_csr, read_csr)
