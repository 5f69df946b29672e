"""The two sparse kernels on CUDA: weighted sums of rows, and products of two rows.

Both gather rows in whatever type they have (bf16 halves the traffic) and add up in float32. Every output element is
written by one program, in the order of the pairs, so results do not change from run to run.

Without Triton, or off CUDA, [`usable`] says no and `sparse_ops` takes PyTorch's kernels.

Shapes: D `d_in`, M pairs, bags of consecutive pairs.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK_D, _BLOCK_PAIRS = 256, 8


def usable(tensor: Tensor) -> bool:
    """Whether these kernels take `tensor`: on CUDA, or anywhere under Triton's interpreter (for tests)."""
    if triton is None or tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _gather_sum_kernel(values, source, index, offsets, out, D, PAIRS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202 (pointers, for Triton)
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Several rows are on their way at once: the first latents of a Matryoshka SAE fire on most tokens, and one at a
    # time their bags would be waited for alone.
    for start in range(begin, end, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        present = pairs < end
        rows = tl.load(index + pairs, mask=present, other=0)
        weights = tl.load(values + pairs, mask=present, other=0.0).to(tl.float32)
        places = source + rows[:, None] * D + columns[None, :]
        tile = tl.load(places, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weights[:, None] * tile, 0)
    tl.store(out + bag * D + columns, total, mask=inside)


def _pair_dot_kernel(left, bags, right, cols, out, D, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202 (likewise)
    pair = tl.program_id(0).to(tl.int64)
    first, second = tl.load(bags + pair) * D, tl.load(cols + pair) * D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < D
        a = tl.load(left + first + columns, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(right + second + columns, mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + pair, tl.sum(total, 0))


if triton is not None:
    _gather_sum_kernel = triton.jit(_gather_sum_kernel)
    _pair_dot_kernel = triton.jit(_pair_dot_kernel)


def gather_sum(
    values: Tensor, source: Tensor, index: Tensor, offsets: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`out[b] = sum of values[m] * source[index[m]]` over the pairs m from `offsets[b]` to `offsets[b + 1]`.

    Args:
        values (`Tensor` of shape `(M,)`), index (`Tensor` of shape `(M,)`): Weight and row of each pair.
        source (`Tensor` of shape `(R, D)`): Rows.
        offsets (`Tensor` of shape `(B + 1,)`): Where each bag begins, and the end of the last.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the sums, which are taken in float32.

    Returns:
        `Tensor` of shape `(B, D)`.
    """
    num_bags, width = len(offsets) - 1, source.shape[1]
    out = torch.empty(num_bags, width, device=source.device, dtype=dtype)
    if out.numel():
        grid = (num_bags, triton.cdiv(width, _BLOCK_D))
        arguments = (part.contiguous() for part in (values, source, index, offsets))
        _gather_sum_kernel[grid](*arguments, out, width, PAIRS=_BLOCK_PAIRS, BLOCK=_BLOCK_D, num_warps=4)
    return out


def pair_dot(left: Tensor, bags: Tensor, right: Tensor, cols: Tensor) -> Tensor:
    """`out[m] = <left[bags[m]], right[cols[m]]>`.

    Args:
        left (`Tensor` of shape `(B, D)`), right (`Tensor` of shape `(R, D)`): Rows.
        bags (`Tensor` of shape `(M,)`), cols (`Tensor` of shape `(M,)`): The two rows of each pair.

    Returns:
        `Tensor` of shape `(M,)`, float32.
    """
    out = torch.empty(len(bags), device=left.device, dtype=torch.float32)
    if len(bags):
        arguments = (part.contiguous() for part in (left, bags, right, cols))
        _pair_dot_kernel[(len(bags),)](*arguments, out, left.shape[1], BLOCK=_BLOCK_D, num_warps=4)
    return out
