"""The encoder's pre-activations, a block of latents at a time: the only N x F numbers there ever are.

Shapes: N tokens, D `d_in`, F latents, B latents in a block, M pairs.
"""

import copy
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .sparse_ops import pair_dot


GROUP = 32
# Entries of one block of pre-activations. Fewer blocks mean fewer candidates that a later block overrules.
BLOCK_ENTRIES = {"cpu": 2**24, "cuda": 2**29}
# A CPU's buffers are kept for the next step: malloc hands memory of this size back to the system, and fetching it anew
# costs a fifth of the matmul. (CUDA tensors have torch's own pool.)
_kept = threading.local()


class EncoderBlocks:
    """The pre-activations `((x - b_dec) W_enc^T + b_enc) * scale`, computed a block of latents at a time.

    Iterating gives `(first latent, block)`, latents ascending. A block `(N, B)` is padded with -inf to whole groups
    and is overwritten by the next one. The product is taken in the wider type of the hidden states and the weights,
    under autocast in its type.

    Args:
        x (`Tensor` of shape `(N, D)`): Hidden states.
        W_enc (`Tensor` of shape `(F, D)`), b_enc (`Tensor` of shape `(F,)`): Encoder.
        b_dec (`Tensor` of shape `(D,)`, *optional*): Subtracted from the input.
        scale (`Tensor` of shape `(F,)`, *optional*): Positive factor of each latent.
        block_latents (`int`, *optional*): B; by default what suits the device and N.
        screening (`bool`, *optional*, defaults to `True`): Whether bf16 products may say which pairs can win.
    """

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None = None,
        scale: Tensor | None = None,
        block_latents: int | None = None,
        screening: bool = True,
    ) -> None:
        self.num_rows, self.num_latents, self.device = len(x), len(W_enc), x.device
        fitting = BLOCK_ENTRIES.get(x.device.type, 2**27) // max(1, len(x))
        self.block_latents = min(whole_groups(block_latents or max(1, fitting)), whole_groups(len(W_enc)))
        autocast = torch.is_autocast_enabled(x.device.type)
        wider = torch.promote_types(x.dtype, W_enc.dtype)
        self.dtype = torch.get_autocast_dtype(x.device.type) if autocast else wider
        self.x = (x if b_dec is None else x - b_dec).to(self.dtype)
        self.W_enc, self.b_enc, self.scale, self.screening = W_enc, b_enc, scale, screening

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The first latent of each block, and the one after its last."""
        for start in range(0, self.num_latents, max(1, self.block_latents)):  # a shard may hold none
            yield start, min(start + self.block_latents, self.num_latents)

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        buffer = take_buffer(self.num_rows * self.block_latents, self.dtype, self.device)
        for start, stop in self.ranges():
            rows, biases = (part[start:stop].to(self.dtype) for part in (self.W_enc, self.b_enc))
            width = whole_groups(len(rows))
            block = buffer[: self.num_rows * width].view(self.num_rows, width)
            torch.addmm(biases, self.x, rows.T, out=block[:, : len(rows)])
            if self.scale is not None:
                block[:, : len(rows)] *= self.scale[start:stop]
            block[:, len(rows) :].fill_(-torch.inf)
            yield start, block
        keep_buffer(buffer)

    def latents(self, start: int, stop: int | None) -> "EncoderBlocks":
        """The same for some of the latents alone."""
        part = copy.copy(self)
        part.W_enc, part.b_enc = self.W_enc[start:stop], self.b_enc[start:stop]
        part.scale = None if self.scale is None else self.scale[start:stop]
        part.num_latents = len(part.W_enc)
        return part

    def rows(self, rows: Tensor) -> "EncoderBlocks":
        """The same for some of the tokens alone."""
        part = copy.copy(self)
        part.x, part.num_rows = self.x[rows], len(rows)
        return part

    @torch.no_grad()
    def exact(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The pre-activations `(M,)` of pairs that are sorted by token: one float32 dot product each.

        A pair's value depends on its token and its latent alone: on neither the batch nor the blocks.
        """
        offsets = torch.searchsorted(rows, torch.arange(self.num_rows + 1, device=rows.device))
        values = pair_dot(self.x, rows, offsets, self.W_enc, cols) + self.b_enc[cols]
        return values if self.scale is None else values * self.scale[cols]


def whole_groups(size: int, group: int = GROUP) -> int:
    """The next multiple of a group's size."""
    return -(-size // group) * group


def take_buffer(entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pop this thread's buffer of a type, which then is nobody else's, or allocate one."""
    buffer = getattr(_kept, "buffers", {}).pop(dtype, None) if device.type == "cpu" else None
    fits = buffer is not None and len(buffer) >= entries
    return buffer if fits else torch.empty(entries, dtype=dtype, device=device)


def keep_buffer(buffer: Tensor) -> None:
    """Leave a buffer to this thread's next step; one made in inference mode cannot be written to outside it."""
    if buffer.device.type == "cpu" and not buffer.is_inference():
        if not hasattr(_kept, "buffers"):
            _kept.buffers = {}
        _kept.buffers[buffer.dtype] = buffer
