"""What tells the families apart: which (token, latent) pairs are selected, and what their values are.

Each family is stateless; its tensors belong to the model. `select` sees blocks of pre-activations without gradient,
`values` gives the selected pairs their differentiable activations.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .selection import EncoderBlocks, Selection, select_above, select_batch_topk, select_topk
from .sparse_ops import jumprelu, row_norms


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
    def select(model: nn.Module, blocks: EncoderBlocks, group: dist.ProcessGroup | None) -> Selection:
        """Tokens, latents and pre-activations of the pairs that take part."""
        return select_above(blocks, 0.0)

    @staticmethod
    def values(model: nn.Module, pre: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activations of the pairs, and the gate a penalty acts on where that is something else."""
        return pre, None


class TopK(Relu):
    """The k largest of a token, if positive (Gao et al. 2024)."""

    @staticmethod
    def select(model, blocks, group):
        return select_topk(blocks, int(model.k))

    @staticmethod
    def values(model, pre, cols):
        return torch.relu(pre), None


class BatchTopK(TopK):
    """In training the k*N largest of the batch; at inference all above `threshold` (Bussmann et al. 2024)."""

    @staticmethod
    def tensors(model, num_latents):
        model.register_buffer("threshold", torch.empty(num_latents, dtype=torch.float32))

    @staticmethod
    def initial(model):
        return {"threshold": 0.0}

    @staticmethod
    def select(model, blocks, group):
        if model.training:
            return select_batch_topk(blocks, model.k, group)
        return select_above(blocks, model.threshold[: blocks.num_latents].clamp(min=0))


class JumpReLU(Relu):
    """`a = pre * 1[pre > threshold]` with learnt thresholds (Rajamanoharan et al. 2024)."""

    @staticmethod
    def tensors(model, num_latents):
        model.threshold = nn.Parameter(torch.empty(num_latents, dtype=torch.float32))

    @staticmethod
    def initial(model):
        return {"threshold": float(model.config.initial_threshold)}

    @staticmethod
    def select(model, blocks, group):
        threshold = model.threshold[: blocks.num_latents].detach()
        # In training the kernel's window reaches below the threshold: silent latents there move it too.
        return select_above(blocks, threshold - model.config.bandwidth / 2 if model.training else threshold)

    @staticmethod
    def values(model, pre, cols):
        return jumprelu(pre, model.threshold[cols], float(model.config.bandwidth))


class Gated(Relu):
    """A gate says whether, a magnitude says how much (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 3-7)."""

    @staticmethod
    def tensors(model, num_latents):
        model.r_mag = nn.Parameter(torch.empty(num_latents))
        model.b_mag = nn.Parameter(torch.empty(num_latents))

    @staticmethod
    def initial(model):
        return {"r_mag": 0.0, "b_mag": 0.0}

    @staticmethod
    def values(model, pre, cols):
        b_enc, b_mag = model.b_enc, model.b_mag
        if model.config.scale_by_decoder_norm:  # `pre` is, so both biases are
            norms = row_norms(model.W_dec)
            b_enc, b_mag = b_enc * norms, b_mag * norms
        return torch.relu(model.r_mag[cols].exp() * (pre - b_enc[cols]) + b_mag[cols]), pre


FAMILIES = {"relu": Relu, "topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU, "gated": Gated}
