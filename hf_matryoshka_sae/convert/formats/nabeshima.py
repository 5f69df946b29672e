"""Nabeshima's `matryoshka-saes`: a state dict with `normalizer.running_avg`.

    x^ = x sqrt(D) / avg,  a = relu(x^ W_enc + b_enc) ||d_i|| avg / sqrt(D)

ReLU, and `b_dec` is not subtracted from the input. Latents are sorted by their mean square; prefixes were drawn anew
at each step, so any width is as good as another, and none is recorded.
"""

import logging
import math

import torch

from ...models import SAEModel
from ..assembly import assemble
from ..base import Format
from ..checkpoint import Checkpoint


logger = logging.getLogger(__name__)


def claims(checkpoint: Checkpoint) -> bool:
    """Return whether the normaliser's state is there."""
    return checkpoint.has("normalizer.running_avg", "W_enc", "W_dec")


def read(checkpoint: Checkpoint) -> SAEModel:
    """Return the SAE of one file."""
    b_enc, b_dec = checkpoint.vector("b_enc"), checkpoint.vector("b_dec")
    W_enc, W_dec = checkpoint.matrices("W_enc", "W_dec", (len(b_enc), len(b_dec)), transposed=(True, False))
    if checkpoint.hints.prefix_widths is None:
        logger.warning(
            "%s was trained with prefixes of random widths; it is loaded as a plain SAE, whose latents are in their "
            "order. Pass the `prefix_widths` at which you want to use it.",
            checkpoint.name,
        )
    sae = assemble(
        checkpoint,
        "relu",
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        apply_b_dec_to_input=False,
        scale_by_decoder_norm=True,
    )
    average = checkpoint.positive("normalizer.running_avg")
    sae.fold_normalization_(torch.zeros_like(sae.b_dec), average / math.sqrt(len(b_dec)))
    return sae


FORMAT = Format("nabeshima", claims, read)
