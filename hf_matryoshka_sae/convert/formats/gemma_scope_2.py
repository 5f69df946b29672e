"""Gemma Scope 2: `<site>/layer_<L>_width_<W>_l0_<size>/params.safetensors`, with or without a `config.json`.

JumpReLU; `b_dec` is not subtracted from the input. They were trained as Matryoshka SAEs, at widths that no file says.
"""

import logging
import re
from typing import Any

from ...models import SAEModel
from ..assembly import assemble
from ..base import Format
from ..checkpoint import Checkpoint
from ..hook_names import from_module_path, hf_model_id


logger = logging.getLogger(__name__)


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the config says so, or a safetensors file has matrices with names in small letters."""
    if checkpoint.config.get("architecture") == "jump_relu":
        return True
    return checkpoint.file_name.endswith(".safetensors") and checkpoint.has("w_enc", "w_dec")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE, or the transcoder without an affine connection, of a folder."""
    config = checkpoint.config
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise ValueError(f"{checkpoint.name} has the architecture {architecture!r}; what is known is 'jump_relu'.")
    if checkpoint.has("affine_skip_connection") or config.get("affine_connection"):
        raise ValueError(
            f"{checkpoint.name} is a transcoder with an affine connection: it adds a matrix times its input, which no "
            "SAE does. Take the one without `_affine`."
        )
    if checkpoint.tensor("w_dec").dim() != 2:
        raise ValueError(
            f"{checkpoint.name} is a crosscoder or cross-layer transcoder (its w_dec has shape "
            f"{tuple(checkpoint.tensor('w_dec').shape)}): its latents write to several layers, those of an SAE to one."
        )
    b_enc, b_dec = checkpoint.vector("b_enc"), checkpoint.vector("b_dec")
    W_enc, W_dec = checkpoint.matrices("w_enc", "w_dec", (len(b_enc), len(b_dec)), transposed=(True, False))
    places = _places(checkpoint)
    if checkpoint.hints.prefix_widths is None and "output_hookpoint" not in places:
        logger.warning(
            "%s: SAEs of Gemma Scope 2 were trained as Matryoshka SAEs, but no file says at which widths; it is "
            "loaded as a plain SAE. Pass `prefix_widths` if you know them.",
            checkpoint.name,
        )
    return assemble(
        checkpoint,
        "jumprelu",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=checkpoint.vector("threshold", length=len(b_enc)),
        apply_b_dec_to_input=False,
        **places,
    )


def _places(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return model and hookpoints from the config, or where it lacks them from the path."""
    config, path = checkpoint.config, checkpoint.name
    places: dict[str, Any] = {"base_model": _model(config.get("model_name"), path)}
    inside, outside = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    layer = re.search(r"layer_(\d+)", path)
    if inside is None and layer is not None:
        inside, outside = _sites(path, f"model.layers.{layer[1]}")
    if inside is not None:
        places["hookpoint"] = from_module_path(inside)
    if outside is not None and outside != inside:
        places["output_hookpoint"] = from_module_path(outside)
    return places


def _sites(path: str, layer: str) -> tuple[str | None, str | None]:
    if "transcoder" in path:
        return f"{layer}.pre_feedforward_layernorm.output", f"{layer}.post_feedforward_layernorm.output"
    sites = {
        "resid_post": f"{layer}.output",
        "attn_out": f"{layer}.self_attn.o_proj.input",
        "mlp_out": f"{layer}.post_feedforward_layernorm.output",
    }
    return next((hook for site, hook in sites.items() if site in path), None), None


def _model(name: str | None, path: str) -> str | None:
    """Return the model's Hub id: configs may have `gemma-v3-...`, and the smallest base model has no `-pt` there."""
    if name is None:
        repository = re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)", path)
        name = f"gemma-3-{repository[1]}-{repository[2]}" if repository else None
    if name is None:
        return None
    name = name.replace("-v3", "-3")
    return hf_model_id(name.replace("-pt", "") if "270m" in name else name)


FORMAT = Format("gemma_scope_2", claims, read)
