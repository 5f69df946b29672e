"""An SAE at inference as dense tensors of static shapes: for torch.export, torch.compile(fullgraph=True) and ONNX.

The model itself selects pairs, and how many there are only the data know, which no exporter can trace.
"""

import torch
from torch import Tensor, nn

from .outputs import normalized
from .sparse_ops import row_norms


class DenseSAE(nn.Module):
    """What an SAE gives for hidden states, by dense tensors alone.

    Args:
        sae ([`SAEModel`]): Its weights are shared.

    Raises:
        `ValueError`: for an SAE whose groups of latents compete (`group_size`).
    """

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        if getattr(sae.config, "group_size", None) is not None:
            raise ValueError("An SAE with `group_size` has no dense way: its groups differ in size once it is pruned.")
        self.sae, self.family, self.k = sae, sae.config.activation_name, sae.k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction and the latents.

        Args:
            hidden_states (`Tensor` of shape `(..., D)`): Raw hidden states, in the type of the weights.

        Returns:
            The reconstruction, `(..., D)`, and all latents, `(..., F)`.
        """
        sae, config = self.sae, self.sae.config
        x, input_norm = hidden_states, None
        if config.input_normalization is not None:
            x, input_norm = normalized(x, config.input_normalization)
        centred = x - sae.b_dec if config.apply_b_dec_to_input else x
        norms = row_norms(sae.W_dec) if config.scale_by_decoder_norm else torch.ones_like(sae.b_enc)
        products = centred @ sae.W_enc.T
        for _ in range(config.refine_steps):  # refinement.py; there are no norms to scale by
            left = x - self._activation(products + sae.b_enc, products, norms) @ sae.W_dec - sae.b_dec
            products = products + config.refine_step_size * (left @ sae.W_dec.T) / row_norms(sae.W_dec).square()
        latents = self._activation((products + sae.b_enc) * norms, products * norms, norms)
        reconstruction = (latents / norms) @ sae.W_dec + sae.b_dec
        if input_norm is not None:
            shift, scale = input_norm
            reconstruction = reconstruction * scale + shift
        return reconstruction, latents

    def _activation(self, pre: Tensor, products: Tensor, norms: Tensor) -> Tensor:
        sae = self.sae
        if self.family == "topk":
            best = pre.topk(min(int(self.k), pre.shape[-1]), dim=-1)
            return torch.zeros_like(pre).scatter(-1, best.indices, torch.relu(best.values))
        if self.family == "gated":
            magnitude = torch.relu(sae.r_mag.exp() * products + sae.b_mag * norms)
            return torch.where(pre > 0, magnitude, 0.0)
        if self.family == "relu":
            return torch.relu(pre)
        threshold = sae.threshold.clamp(min=0) if self.family == "batch_topk" else sae.threshold
        return torch.where(pre > threshold, pre, 0.0)
