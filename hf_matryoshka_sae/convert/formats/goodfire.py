"""Goodfire's SAEs and those of DeepSeek-R1: state dicts of two linear layers, ReLU, `b_dec` only added."""

import re

from ...models import SAEModel
from ..assembly import assemble
from ..base import Format
from ..checkpoint import Checkpoint


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether two linear layers have Goodfire's names, or the file DeepSeek's."""
    if checkpoint.has("encoder_linear.weight", "decoder_linear.weight"):
        return True
    return "DeepSeek-R1" in checkpoint.file_name and checkpoint.has("encoder.weight", "decoder.weight", "decoder.bias")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of one file; its name says model and layer."""
    suffix = "_linear" if checkpoint.has("encoder_linear.weight") else ""
    b_enc, b_dec = checkpoint.vector(f"encoder{suffix}.bias"), checkpoint.vector(f"decoder{suffix}.bias")
    W_enc, W_dec = checkpoint.matrices(
        f"encoder{suffix}.weight", f"decoder{suffix}.weight", (len(b_enc), len(b_dec)), transposed=(False, True)
    )
    places = {}
    layer = re.search(r"[-_]l(\d+)", checkpoint.file_name)
    if layer is not None:
        places["hookpoint"] = f"model.layers.{layer[1]}"
    model = re.match(r"((Llama|DeepSeek)-.+?)-SAE", checkpoint.file_name)
    if model is not None:
        places["base_model"] = f"{'meta-llama' if model[2] == 'Llama' else 'deepseek-ai'}/{model[1]}"
    return assemble(
        checkpoint, "relu", W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec, apply_b_dec_to_input=False, **places
    )


FORMAT = Format("goodfire", claims, read)
