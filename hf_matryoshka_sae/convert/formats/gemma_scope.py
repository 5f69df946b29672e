"""Gemma Scope (Lieberum et al. 2024): `layer_<L>/width_<W>/average_l0_<n>/params.npz`, JumpReLU.

`b_dec` is not subtracted from the input. Nothing but the arrays is stored: language model and place are inferred from
the path. SAEs of embeddings were trained on embeddings times sqrt(D), which is put back into their weights.
"""

import re
from pathlib import Path

import numpy as np
from torch import Tensor

from ...models import SAEModel
from ...models.saving import staged_files
from ..assembly import assemble, cpu_tensors, plain
from ..base import Format, first_objection
from ..checkpoint import Checkpoint
from ..hook_names import from_transformer_lens


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether it is a numpy archive."""
    return checkpoint.file_name.endswith(".npz")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of one archive; names may be in small letters."""
    b_enc, b_dec = checkpoint.vector("b_enc"), checkpoint.vector("b_dec")
    encoder = "W_enc" if checkpoint.has("W_enc") else "w_enc"
    decoder = "W_dec" if checkpoint.has("W_dec") else "w_dec"
    W_enc, W_dec = checkpoint.matrices(encoder, decoder, (len(b_enc), len(b_dec)), transposed=(True, False))
    threshold = checkpoint.vector("threshold", length=len(b_enc))
    if "embedding" in Path(checkpoint.name).parts[-5:]:
        W_enc, W_dec = W_enc / len(b_dec) ** 0.5, W_dec * len(b_dec) ** 0.5
    if checkpoint.has("scaling_factor"):
        factors = checkpoint.vector("scaling_factor", length=len(b_enc))
        W_enc, b_enc, threshold = _scaled_outputs(checkpoint, factors, W_enc, b_enc, threshold)
    return assemble(
        checkpoint,
        "jumprelu",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=threshold,
        apply_b_dec_to_input=False,
        **_places(checkpoint.name),
    )


def _scaled_outputs(
    checkpoint: Checkpoint, factors: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold a factor for each latent after its activation into encoder and threshold; return them."""
    if (factors <= 0).any():
        raise ValueError(
            f"scaling_factor of {checkpoint.name} should be positive; {int((factors <= 0).sum())} of its entries are "
            "not, and latents of an SAE here cannot be negative."
        )
    # A threshold below 0 acts like one of 0, behind a ReLU; so does its multiple.
    return W_enc * factors[:, None], b_enc * factors, threshold * factors


def _places(path: str) -> dict[str, str]:
    """Return language model and hookpoint, where the path names the repository and the layer."""
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", path)
    if repository is None:
        return {}
    size, variant, site = repository.groups()
    model = f"google/gemma-2-{size}" + ("-it" if variant == "it" else "")
    if "embedding" in Path(path).parts:
        return {"base_model": model, "hookpoint": from_transformer_lens("hook_embed", model)}
    layer = re.search(r"layer_(\d+)", path)
    if layer is None:
        return {"base_model": model}
    hooks = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "hook_mlp_in"}
    places = {"base_model": model, "hookpoint": from_transformer_lens(f"blocks.{layer[1]}.{hooks[site]}", model)}
    if site == "transcoders":
        places["output_hookpoint"] = from_transformer_lens(f"blocks.{layer[1]}.hook_mlp_out", model)
    return places


def objection(sae: SAEModel) -> str | None:
    """Return why an archive of Gemma Scope cannot express this; `None` where it can."""
    config = sae.config
    return first_objection(
        (config.activation_name != "jumprelu", f"its SAEs are JumpReLU, and this one is {config.activation_name}"),
        (hasattr(config, "prefix_widths"), "it has no place for prefix widths"),
        (config.input_normalization is not None, "its SAEs do not normalise each hidden state"),
        (config.output_hookpoint is not None, "nothing but the name of its repository says that one is a transcoder"),
    )


def write(sae: SAEModel, path: Path) -> None:
    """Write one archive: `path` itself where that ends in `.npz`, else `params.npz` in it."""
    tensors = {name: tensor.float().numpy() for name, tensor in cpu_tensors(plain(sae, subtracts=False)).items()}
    name = path.name if path.suffix == ".npz" else "params.npz"
    with staged_files(path.parent if path.suffix == ".npz" else path, keep_others=True, last=name) as staging:
        np.savez(
            staging / name,
            W_enc=np.ascontiguousarray(tensors["W_enc"].T),
            **{key: tensors[key] for key in ("W_dec", "b_enc", "b_dec", "threshold")},
        )


FORMAT = Format("gemma_scope", claims, read, objection, write)
