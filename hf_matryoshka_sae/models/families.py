"""What tells the families apart: which (token, latent) pairs are selected, and what their values are.

Each family is stateless; its tensors belong to the model. `select` sees blocks of pre-activations without gradient,
`values` gives the selected pairs their differentiable activations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .encoder_blocks import EncoderBlocks
from .selection import Selection, select_above, select_batch_topk, select_group_max, select_topk
from .sharding import Layout
from .sparse_ops import row_norms


class _JumpReLU(torch.autograd.Function):
    """`z * H(z - theta)` and `H(z - theta)`, with rectangle-kernel gradients to theta (arXiv 2407.14435, eq. 11-12).

    The kernel sees the pre-activation z, so that thresholds feel latents on both sides of the jump. `theta` may be of
    higher precision than `z`: rounded to bf16 it would move past pre-activations.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        gate = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, gate)
        ctx.bandwidth = bandwidth
        return z * gate, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor, grad_gate: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, gate = ctx.saved_tensors
        window = ((z - theta).abs() < ctx.bandwidth / 2).to(theta.dtype) / ctx.bandwidth
        return grad_value * gate, -window * (theta * grad_value + grad_gate), None


def jumprelu(z: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """JumpReLU and its gate for pre-activations `z` with thresholds `theta` of the same shape.

    Returns:
        The activations `z * 1[z > theta]` and the gates `1[z > theta]`; both give gradients to `theta`, and only the
        first to `z` (Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 11 and 12).
    """
    return _JumpReLU.apply(z, theta, bandwidth)


class Relu:
    """`a = relu(pre)`."""

    @staticmethod
    def tensors(model: nn.Module, num_latents: int) -> None:
        """Create the tensors that only this family has."""

    @staticmethod
    def initial(model: nn.Module) -> dict[str, float]:
        """Initial value of each of these tensors."""
        return {}

    @staticmethod
    def select(model: nn.Module, blocks: EncoderBlocks, layout: Layout | None) -> Selection:
        """Tokens, latents and pre-activations of the pairs that take part."""
        return select_above(blocks, 0.0)

    @staticmethod
    def values(model: nn.Module, pre: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activations of the pairs, and the gate a penalty acts on where that is something else."""
        return pre, None


class TopK(Relu):
    """The k largest of a token, if positive (Gao et al. 2024); or the largest of each group of latents."""

    @staticmethod
    def select(model: nn.Module, blocks: EncoderBlocks, layout: Layout | None) -> Selection:
        """Tokens, latents and pre-activations of the pairs that take part."""
        group_size = getattr(model.config, "group_size", None)
        if group_size is not None:
            return select_group_max(blocks, model.latent_ids[: blocks.num_latents] // group_size)
        return select_topk(blocks, int(model.k), layout=layout)

    @staticmethod
    def values(model: nn.Module, pre: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activations of the pairs, and the gate a penalty acts on where that is something else."""
        return torch.relu(pre), None


class BatchTopK(TopK):
    """In training the k*N largest of the batch; at inference all above `threshold` (Bussmann et al. 2024)."""

    @staticmethod
    def tensors(model: nn.Module, num_latents: int) -> None:
        """Create the tensors that only this family has."""
        model.register_buffer("threshold", torch.empty(num_latents, dtype=torch.float32))

    @staticmethod
    def initial(model: nn.Module) -> dict[str, float]:
        """Initial value of each of these tensors."""
        return {"threshold": 0.0}

    @staticmethod
    def select(model: nn.Module, blocks: EncoderBlocks, layout: Layout | None) -> Selection:
        """Tokens, latents and pre-activations of the pairs that take part."""
        if model.training:
            return select_batch_topk(blocks, model.k, layout)
        return select_above(blocks, model.threshold[: blocks.num_latents].clamp(min=0))


class JumpReLU(Relu):
    """`a = pre * 1[pre > threshold]` with learnt thresholds (Rajamanoharan et al. 2024)."""

    @staticmethod
    def tensors(model: nn.Module, num_latents: int) -> None:
        """Create the tensors that only this family has."""
        model.threshold = nn.Parameter(torch.empty(num_latents, dtype=torch.float32))

    @staticmethod
    def initial(model: nn.Module) -> dict[str, float]:
        """Initial value of each of these tensors."""
        return {"threshold": float(model.config.initial_threshold)}

    @staticmethod
    def select(model: nn.Module, blocks: EncoderBlocks, layout: Layout | None) -> Selection:
        """Tokens, latents and pre-activations of the pairs that take part."""
        threshold = model.threshold[: blocks.num_latents].detach()
        # In training the kernel's window reaches below the threshold: silent latents there move it too.
        return select_above(blocks, threshold - model.config.bandwidth / 2 if model.training else threshold)

    @staticmethod
    def values(model: nn.Module, pre: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activations of the pairs, and the gate a penalty acts on where that is something else."""
        return jumprelu(pre, model.threshold[cols], float(model.config.bandwidth))


class Gated(Relu):
    """A gate says whether, a magnitude says how much (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 3-7)."""

    @staticmethod
    def tensors(model: nn.Module, num_latents: int) -> None:
        """Create the tensors that only this family has."""
        model.r_mag = nn.Parameter(torch.empty(num_latents))
        model.b_mag = nn.Parameter(torch.empty(num_latents))

    @staticmethod
    def initial(model: nn.Module) -> dict[str, float]:
        """Initial value of each of these tensors."""
        return {"r_mag": 0.0, "b_mag": 0.0}

    @staticmethod
    def values(model: nn.Module, pre: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activations of the pairs, and the gate a penalty acts on where that is something else."""
        b_enc, b_mag = model.b_enc, model.b_mag
        if model.config.scale_by_decoder_norm:  # `pre` is, so both biases are
            norms = row_norms(model.W_dec)
            b_enc, b_mag = b_enc * norms, b_mag * norms
        return torch.relu(model.r_mag[cols].exp() * (pre - b_enc[cols]) + b_mag[cols]), pre


FAMILIES = {"relu": Relu, "topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU, "gated": Gated}
