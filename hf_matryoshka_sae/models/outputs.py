"""What an SAE returns: sparse latents, a few (value, index) slots per token, and all that `forward` gives."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from transformers.utils import ModelOutput


InputNorm = tuple[Tensor, Tensor]
"""What was taken off each token's hidden state, and what it was then divided by: `(..., 1)` each."""

_LAYER_NORM_EPS = 1e-5  # added to the standard deviation that divides, not to the one that multiplies back


def normalized(x: Tensor, kind: str) -> tuple[Tensor, InputNorm]:
    """Hidden states `(N, D)` with each token normalised as a config's `input_normalization` says, and how it was."""
    if kind == "constant_norm":
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (norms / x.shape[-1] ** 0.5).to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)
        return x / scale, (torch.zeros_like(scale), scale)
    mean = x.mean(-1, keepdim=True)
    deviation = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (deviation + _LAYER_NORM_EPS), (mean, deviation)


@dataclass
class SparseLatents:
    """Latents of a batch as padded (value, index) slots.

    It moves and is indexed over its tokens as the `(..., F)` tensor that it stands for: `latents.to("cuda")`,
    `latents[0, -1]`, `latents[mask]`.

    Args:
        values (`Tensor` of shape `(..., K)`): Activations; a padded slot is 0.
        indices (`Tensor` of shape `(..., K)`): Latents, ascending; a padded slot is 0.
        num_latents (`int`): Size F of the dictionary.
        input_norm (`tuple` of two `Tensor`s of shape `(..., 1)`, *optional*):
            Shift and scale of each token, which decoding undoes; of SAEs with an `input_normalization`.
    """

    values: Tensor
    indices: Tensor
    num_latents: int
    input_norm: InputNorm | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape `(..., F)` of [`to_dense`]; that of `values` ends with the number of slots."""
        return torch.Size((*self.values.shape[:-1], self.num_latents))

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def l0(self) -> Tensor:
        """Number of latents that fire, per token, `(...)`."""
        return (self.values > 0).sum(-1)

    def to_dense(self) -> Tensor:
        """The same activations as a `(..., F)` tensor."""
        dense = self.values.new_zeros(self.shape)
        # scatter_add: padded slots add 0 to latent 0 instead of overwriting it.
        return dense.scatter_add(-1, self.indices, self.values)

    def to(self, *args: Any, **kwargs: Any) -> "SparseLatents":
        """The same latents on another device or with values of another type; arguments as of `Tensor.to`."""
        values = self.values.to(*args, **kwargs)
        indices = self.indices.to(values.device, non_blocking=kwargs.get("non_blocking", False))
        norm = self.input_norm and tuple(part.to(*args, **kwargs) for part in self.input_norm)
        return replace(self, values=values, indices=indices, input_norm=norm)

    def detach(self) -> "SparseLatents":
        """The same latents without a gradient."""
        norm = self.input_norm and tuple(part.detach() for part in self.input_norm)
        return replace(self, values=self.values.detach(), input_norm=norm)

    def __len__(self) -> int:
        if self.values.dim() == 1:
            raise TypeError("The latents of one token have no length; `l0` is how many fire.")
        return len(self.values)

    def __getitem__(self, index: Any) -> "SparseLatents":
        """The latents of some tokens: `index` is of a tensor of the tokens, of shape `(...)`."""
        if isinstance(index, tuple) and any(part is Ellipsis for part in index[:-1]):
            raise IndexError("Only tokens can be indexed. For single latents take `to_dense()[..., latent]`.")
        tokens = self.values.shape[:-1]
        chosen = torch.arange(tokens.numel(), device=self.device).view(tokens)[index]

        def of_chosen(slots: Tensor) -> Tensor:
            # No -1: it cannot be inferred where there are no tokens or no slots.
            rows = slots.reshape(tokens.numel(), slots.shape[-1])[chosen.flatten()]
            return rows.view(*chosen.shape, slots.shape[-1])

        norm = self.input_norm and tuple(map(of_chosen, self.input_norm))
        return replace(self, values=of_chosen(self.values), indices=of_chosen(self.indices), input_norm=norm)


def _flattened(latents: SparseLatents) -> tuple[list, int]:
    return [latents.values, latents.indices, latents.input_norm], latents.num_latents


def _unflattened(parts: Any, num_latents: int) -> SparseLatents:
    values, indices, input_norm = parts
    return SparseLatents(values, indices, num_latents, input_norm)


# So that FSDP and DDP see the tensors in them: they wait for gradients of what they find.
pytree.register_pytree_node(SparseLatents, _flattened, _unflattened)


@dataclass
class SAEOutput(ModelOutput):
    """What an SAE returns.

    Args:
        loss (`Tensor`): Weighted mean over prefixes of the squared error, summed over D and averaged over tokens.
        reconstruction (`Tensor` of shape `(..., D)`): Of the widest prefix.
        latents ([`SparseLatents`]): Values and indices, `(..., K)` each.
        losses (`dict[str, Tensor]`): `"sse"` of shape `(P,)`, the squared error of each prefix.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    latents: SparseLatents | None = None
    losses: dict[str, Tensor] | None = None
