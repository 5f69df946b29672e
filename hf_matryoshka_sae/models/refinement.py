"""Codes that look again at what they left out.

One product with the encoder does not know which other latents fire. A step of iterative shrinkage-thresholding
(Daubechies et al. 2004; LISTA, Gregor and LeCun 2010, unrolls it) does: each pre-activation moves towards what is left
of the hidden state, along the latent's row d of the decoder, and the family chooses again.

    pre_0 = W_enc (x - b_dec) + b_enc
    pre_t = pre_(t-1) + size * d^T (x - x^(pre_(t-1))) / ||d||^2

A prefix takes its own reconstruction for x^, so that the first latents stay an SAE of their own. Multiplying a row and
dividing its activations changes nothing.

Shapes: N tokens, D `d_in`, F latents, M pairs.
"""

from typing import Any

import torch
from torch import Tensor

from .cuts import Selection
from .encoder_blocks import EncoderBlocks
from .sharding import Layout
from .sparse_ops import LatentPairs, PairIndex, row_norms


def select_pairs(sae: Any, x: Tensor, width: int, scale: Tensor | None, layout: Layout | None) -> Selection:
    """Select which of the first `width` latents fire, after the config's `refine_steps`.

    Args:
        sae ([`SAEModel`]): The SAE.
        x (`Tensor` of shape `(N, D)`): Hidden states as the encoder sees them.
        width (`int`): Latents past it are not computed.
        scale (`Tensor` of shape `(F,)`, *optional*): Factor of each latent, where the config scales by the decoder's
            norms.
        layout ([`Layout`], *optional*): Processes that share one batch or one dictionary.

    Returns:
        Tokens, latents and pre-activations, `(M,)` each, as the family selects them.
    """
    config, b_dec = sae.config, sae.b_dec if sae.config.apply_b_dec_to_input else None
    W_enc, b_enc = sae.W_enc[:width], sae.b_enc[:width]
    factors = None if scale is None else scale[:width]
    blocks = EncoderBlocks(x, W_enc, b_enc, b_dec, factors, screening=config.screening)
    chosen = sae.family.select(sae, blocks, layout)
    if not config.refine_steps:
        return chosen
    assert scale is None, "refused by the config"
    assert layout is None, "training does not refine"
    centred, missing = x if b_dec is None else x - b_dec, torch.zeros_like(x)
    W_dec = sae.W_dec[:width]
    # One product with both: the correction is an encoder of its own, of all that was left out so far.
    weights = torch.cat([W_enc, W_dec * (config.refine_step_size / row_norms(W_dec).square())[:, None]], 1)
    for _ in range(config.refine_steps):
        rows, cols, pre = chosen
        values, _ = sae.family.values(sae, pre, cols)
        code = LatentPairs(PairIndex(rows, cols, len(x), config.num_latents), values)
        missing = missing + x - sae.decode_pairs(code, [width])[0].to(x.dtype)
        blocks = EncoderBlocks(torch.cat([centred, missing], 1), weights, b_enc, screening=config.screening)
        chosen = sae.family.select(sae, blocks, layout)
    return chosen
