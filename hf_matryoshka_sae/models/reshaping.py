"""The same dictionary in another shape: fewer latents, another order, other units."""

import copy
from typing import Self

import torch
from torch import Tensor

from .dense_ops import matrix_vector
from .sparse_ops import row_norms


class Reshaping:
    """What every SAE can do with its dictionary; a part of [`SAEModel`]."""

    @torch.no_grad()
    def truncate(self, width: int) -> Self:
        """A new SAE of the same class with the first `width` latents."""
        config = copy.deepcopy(self.config)
        for name, value in config.truncated(width).items():
            setattr(config, name, value)
        smaller = type(self)(config).to(device=self.W_enc.device, dtype=self.W_enc.dtype).train(self.training)
        if hasattr(self, "threshold"):  # kept in fp32 where the weights are not
            smaller.threshold.data = smaller.threshold.data.to(self.threshold.dtype)
        for name, tensor in smaller.state_dict().items():
            source = self.state_dict()[name]
            tensor.copy_(source if name == "b_dec" else source[:width])
        return smaller

    @torch.no_grad()
    def permute_(self, order: Tensor) -> None:
        """Put the latents into a new order; `latent_ids` go with them."""
        for name, tensor in self.state_dict().items():
            if name != "b_dec":
                tensor.copy_(tensor[order])

    @torch.no_grad()
    def fold_normalization_(self, mean: Tensor, scale: float) -> None:
        """Make an SAE for `(x - mean) / scale` take raw `x`, and give raw reconstructions (exact, in place).

        Latents come out multiplied by `scale`. `fold_normalization_(-mean / scale, 1 / scale)` undoes it.
        """
        if self.config.input_normalization is not None:
            raise ValueError("An SAE that normalises each hidden state by itself cannot take a normalisation for all.")
        mean = mean.to(self.b_dec)
        shift = 0 if self.config.apply_b_dec_to_input else matrix_vector(self.W_enc, mean)
        if self.config.activation_name == "gated":
            self.b_mag.copy_(self.b_mag * scale - self.r_mag.exp() * shift)
        self.b_enc.copy_(self.b_enc * scale - shift)
        self.b_dec.copy_(self.b_dec * scale + mean)
        if hasattr(self, "threshold"):
            self.threshold.mul_(scale)
        if hasattr(self.config, "bandwidth"):
            # Nine digits, as float32 has: the last ones of a scale hang on how many processes summed it.
            self.config.bandwidth = float(f"{self.config.bandwidth * scale:.9g}")

    @torch.no_grad()
    def fold_decoder_norm_(self) -> None:
        """Give the decoder unit rows and the encoder their norms (in place; exact for what the config selects by)."""
        norms = row_norms(self.W_dec)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms[:, None])
        self.b_enc.mul_(norms)
        if self.config.activation_name == "gated":
            self.b_mag.mul_(norms)
        # Where latents are scaled by the norm, thresholds already are in those units.
        if hasattr(self, "threshold") and not self.config.scale_by_decoder_norm:
            self.threshold.mul_(norms)
        self.config.scale_by_decoder_norm = False
