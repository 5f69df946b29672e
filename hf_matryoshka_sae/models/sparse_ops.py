"""The sparse operations every family is made of.

After the encoder's matmul nothing of size N x F is built again: a selection gives (token, latent) pairs once, and both
the encoder and the decoder get gradients through those pairs alone. Two kernels do all the work, each a pass over the
pairs: `gather_sum` (weighted sums of rows) and `pair_dot` (products of two rows). PyTorch has both, as embedding_bag
and its backward pass for the weights; on CUDA they are replaced by those of `triton_ops`, where Triton is installed.

Shapes: N tokens, D `d_in`, F `num_latents`, K slots, P prefixes, M pairs. Pairs are sorted by token, then by latent.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Not `from . import`: where this package is not installed, the loader of remote code does not see that.
from .dense_ops import decode_groups, decoder_gradients, latent_gradients, vector_matrix, worthwhile
from .dense_ops import spread as spread_dense
from .outputs import InputNorm, SparseLatents
from .sharding import Layout
from .triton_ops import gather_sum as triton_gather_sum
from .triton_ops import pair_dot as triton_pair_dot
from .triton_ops import usable as triton_usable


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which squares of numbers of type `dtype` are summed: in half precision that of 256 overflows."""
    return torch.promote_types(dtype, torch.float32)


def row_norms(rows: Tensor) -> Tensor:
    """Lengths of rows, `(F,)`; never 0, so that a row of zeros can be divided by its own."""
    return rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)


@dataclass
class PairIndex:
    """Where the pairs of a batch are: tokens and latents, sorted by token, then by latent.

    Args:
        rows (`Tensor` of shape `(M,)`): Token of each pair.
        cols (`Tensor` of shape `(M,)`): Latent of each pair.
        num_rows (`int`): N.
        num_latents (`int`): F.
    """

    rows: Tensor
    cols: Tensor
    num_rows: int
    num_latents: int

    @property
    def dense(self) -> bool:
        """Whether there are so many pairs that matmuls are cheaper."""
        return worthwhile(len(self.rows), self.num_rows, self.num_latents)

    def spread(self, values: Tensor) -> Tensor:
        """Values `(M,)` of the pairs as an `(N, F)` tensor."""
        return spread_dense(values, self.rows, self.cols, (self.num_rows, self.num_latents))

    @cached_property
    def by_token(self) -> Tensor:
        """Offsets `(N + 1,)` of each token's pairs."""
        return _offsets(self.rows, self.num_rows)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The order `(M,)` that sorts pairs by latent, then by token, and the offsets `(F + 1,)` of each latent's."""
        cols, order = self.cols.sort(stable=True)
        return order, _offsets(cols, self.num_latents)

    def by_group(self, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The bag `(M,)` of each pair, `token * P + group`, and the offsets `(N P + 1,)` of the bags.

        A latent is in group p where prefix p is the narrowest that holds it.
        """
        bags = self.rows * len(widths)
        for width in widths[:-1]:  # numbers, not a tensor: nothing is copied to the device
            bags = bags + (self.cols >= width)
        return bags, _offsets(bags, self.num_rows * len(widths))


def _offsets(sorted_bags: Tensor, num_bags: int) -> Tensor:
    """Return where each bag begins, and the end of the last, `(num_bags + 1,)`."""
    # bincount would make the host wait for the device.
    return torch.searchsorted(sorted_bags, torch.arange(num_bags + 1, device=sorted_bags.device))


@dataclass
class LatentPairs:
    """Latents of a batch as a list of (token, latent, value).

    Args:
        index ([`PairIndex`]): Tokens and latents.
        values (`Tensor` of shape `(M,)`): Activation; differentiable. May be 0.
        gate (`Tensor` of shape `(M,)`, *optional*):
            What a sparsity penalty acts on where that is not the value: JumpReLU's step, Gated's gate.
        input_norm (`tuple` of two `Tensor`s of shape `(N, 1)`, *optional*): As in [`SparseLatents`].
    """

    index: PairIndex
    values: Tensor
    gate: Tensor | None = None
    input_norm: InputNorm | None = None

    @property
    def rows(self) -> Tensor:
        """Token of each pair, `(M,)`."""
        return self.index.rows

    @property
    def cols(self) -> Tensor:
        """Latent of each pair, `(M,)`."""
        return self.index.cols

    @property
    def num_rows(self) -> int:
        """N."""
        return self.index.num_rows

    @property
    def num_latents(self) -> int:
        """F."""
        return self.index.num_latents

    def to_slots(self) -> SparseLatents:
        """Pad every token to the same number K of slots."""
        offsets = self.index.by_token
        width = int(offsets.diff().max()) if self.num_rows else 0
        slot = torch.arange(len(self.rows), device=self.rows.device) - offsets[self.rows]
        values = self.values.new_zeros(self.num_rows, width).index_put((self.rows, slot), self.values)
        indices = self.cols.new_zeros(self.num_rows, width).index_put((self.rows, slot), self.cols)
        return SparseLatents(values, indices, self.num_latents, self.input_norm)

    def keep(self, mask: Tensor) -> "LatentPairs":
        """Only the pairs where `mask` is true."""
        index = PairIndex(self.rows[mask], self.cols[mask], self.num_rows, self.num_latents)
        return LatentPairs(index, self.values[mask], None if self.gate is None else self.gate[mask], self.input_norm)

    def with_values(self, values: Tensor) -> "LatentPairs":
        """The same pairs with other values."""
        return replace(self, values=values, gate=None)


def pairs_from_slots(values: Tensor, indices: Tensor, num_latents: int) -> LatentPairs:
    """The pairs of `(N, K)` slots; slots of value 0 are dropped, the order of a token's slots does not matter."""
    order = indices.argsort(dim=-1, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    rows, slots = (values != 0).nonzero(as_tuple=True)
    return LatentPairs(PairIndex(rows, indices[rows, slots], len(values), num_latents), values[rows, slots])


# The two kernels


def gather_sum(
    values: Tensor, source: Tensor, index: Tensor, offsets: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """`out[b] = sum of values[m] * source[index[m]]` over the pairs m from `offsets[b]` to `offsets[b + 1]`.

    The sum is taken in float32 at least, and then rounded to `dtype` (by default what the kernel gives).
    """
    if triton_usable(source):
        return triton_gather_sum(values, source, index, offsets, dtype or torch.float32)
    out = F.embedding_bag(
        index, source, offsets, mode="sum", per_sample_weights=values.to(source.dtype), include_last_offset=True
    )
    return out.to(dtype or out.dtype)


def pair_dot(left: Tensor, bags: Tensor, offsets: Tensor, right: Tensor, cols: Tensor) -> Tensor:
    """`out[m] = <left[bags[m]], right[cols[m]]>`, with no [M, D] block in between. Pairs of a bag follow each other.

    This is embedding_bag's own backward pass for its weights; called directly because autograd offers it only together
    with a second forward pass, and gathering both sides is 10 to 30 times slower on a CPU.
    """
    if triton_usable(right):
        return triton_pair_dot(left, bags, right, cols)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.to(right.dtype), right, cols, offsets[:-1], bags, 0, -1
    )


def _read_type(tensor: Tensor) -> torch.dtype:
    """The type in which rows are gathered: autocast's where the kernels still add up in float32."""
    if triton_usable(tensor) and torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


# Differentiable operations


class _EncodePairs(torch.autograd.Function):
    """The pre-activations of the selected pairs, with gradients from those pairs alone."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, scale, pre, index) -> Tensor:  # noqa: ANN001 (as `encode_pairs`)
        ctx.save_for_backward(x, W_enc, b_dec, scale, pre)
        ctx.index, ctx.read_type, ctx.dtype = index, _read_type(W_enc), b_enc.dtype
        # Gradients come back in the biases' type, also where the matmul or the matrices are bf16.
        return pre.to(b_enc.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, scale, pre = ctx.saved_tensors
        index, need = ctx.index, ctx.needs_input_grad
        grad = grad.to(ctx.dtype)
        grads = [None] * 5
        if need[4]:
            to_scale = grad * pre / scale[index.cols]
            grads[4] = to_scale.new_zeros(len(scale)).index_add_(0, index.cols, to_scale).to(scale.dtype)
        if scale is not None:
            grad = grad * scale[index.cols]
        grad_b = grad.new_zeros(len(W_enc)).index_add_(0, index.cols, grad)
        centred = (x if b_dec is None else x - b_dec).to(ctx.read_type)
        spread = index.spread(grad) if index.dense else None
        if need[0]:
            sparse = spread is None
            to_x = gather_sum(grad, W_enc, index.cols, index.by_token) if sparse else spread.to(W_enc.dtype) @ W_enc
            grads[0] = to_x.to(x.dtype)
        if need[1] and spread is None:
            order, offsets = index.by_latent
            grads[1] = gather_sum(grad[order], centred, index.rows[order], offsets, W_enc.dtype)
        elif need[1]:
            grads[1] = (spread.T.to(centred.dtype) @ centred).to(W_enc.dtype)
        if need[2]:
            grads[2] = grad_b
        if need[3]:
            grads[3] = -vector_matrix(grad_b, W_enc)  # the batch is summed before the mat-vec
        return *grads, None, None


def _decode_groups(
    ctx: Any, values: Tensor, W_dec: Tensor, index: PairIndex, widths: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum over each group's pairs, `(N, P, D)` in `dtype`, in one pass, and what its backward pass needs."""
    source = W_dec.to(_read_type(W_dec))
    ctx.index, ctx.W_dtype, ctx.widths = index, W_dec.dtype, widths
    if index.dense:
        out = decode_groups(index.spread(values.to(source.dtype)), source, widths)
        return out.to(dtype), (values, source, None, None)
    bags, offsets = index.by_group(widths)
    out = gather_sum(values, source, index.cols, offsets, dtype)
    return out.view(index.num_rows, len(widths), W_dec.shape[1]), (values, source, bags, offsets)


def _decode_gradients(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the values and to W_dec from those of the group sums."""
    values, source, bags, offsets = saved
    grad_values = grad_W = None
    if ctx.index.dense:
        grad = grad.to(source.dtype)
        if ctx.needs_input_grad[0]:
            to_latents = latent_gradients(grad, source, ctx.widths)
            grad_values = to_latents[ctx.index.rows, ctx.index.cols].to(values.dtype)
        if ctx.needs_input_grad[1]:
            latents = ctx.index.spread(values.to(source.dtype))
            grad_W = decoder_gradients(grad, latents, ctx.widths).to(ctx.W_dtype)
        return grad_values, grad_W
    grad = grad.reshape(-1, grad.shape[-1]).to(source.dtype)
    if ctx.needs_input_grad[0]:
        grad_values = pair_dot(grad, bags, offsets, source, ctx.index.cols).to(values.dtype)
    if ctx.needs_input_grad[1]:
        order, of_latent = ctx.index.by_latent
        grad_W = gather_sum(values[order], grad, bags[order], of_latent, ctx.W_dtype)
    return grad_values, grad_W


class _DecodeGroups(torch.autograd.Function):
    """The sum over each group's pairs, `(N, P, D)`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, index: PairIndex, widths: tuple[int, ...]) -> Tensor:
        groups, saved = _decode_groups(ctx, values, W_dec, index, widths, W_dec.dtype)
        ctx.save_for_backward(*saved)
        return groups

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_decode_gradients(ctx, ctx.saved_tensors, grad), None, None


class _PrefixErrors(torch.autograd.Function):
    """The squared error of every prefix and the residual of the last.

    The error of prefix p is e_p = b_dec - x + the groups up to p. Backward: with G_p = 2 / N * dL/dsse_p * e_p, group
    g receives the suffix sum S_g of G_p over p >= g. Both ways are P passes over [N, D].

    Of a sharded dictionary each process decodes its own pairs, and one sum over the shards makes the groups. What
    follows is the same on all of them, so the way back needs no exchange; b_dec's gradient is left to the first shard.
    """

    @staticmethod
    def forward(ctx, values, W_dec, b_dec, x, index, widths, layout) -> tuple[Tensor, Tensor]:  # noqa: ANN001 (as `prefix_errors`)
        errors, saved = _decode_groups(ctx, values, W_dec, index, widths, b_dec.dtype)
        ctx.counts_bias = layout is None or layout.shard == 0
        if layout is not None and layout.shards > 1:
            dist.all_reduce(errors, group=layout.shard_group)
        errors[:, 0] += b_dec - x
        for p in range(1, errors.shape[1]):
            errors[:, p] += errors[:, p - 1]
        ctx.save_for_backward(errors, *saved)
        ctx.set_materialize_grads(False)
        sse = torch.linalg.vector_norm(errors, dim=-1, dtype=at_least_float32(errors.dtype)).square().mean(0)
        return sse, errors[:, -1].neg()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sse: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        errors, *saved = ctx.saved_tensors
        grad_sse = errors.new_zeros(errors.shape[1]) if grad_sse is None else grad_sse
        factors = grad_sse * (2 / max(1, len(errors)))
        suffix = torch.empty_like(errors)
        torch.mul(errors[:, -1], factors[-1], out=suffix[:, -1])
        if grad_residual is not None:
            suffix[:, -1] -= grad_residual
        for p in range(errors.shape[1] - 2, -1, -1):
            torch.addcmul(suffix[:, p + 1], errors[:, p], factors[p], out=suffix[:, p])
        need = ctx.needs_input_grad
        grad_b_dec = suffix[:, 0].sum(0) if need[2] and ctx.counts_bias else None
        grad_x = -suffix[:, 0] if need[3] else None
        return *_decode_gradients(ctx, saved, suffix), grad_b_dec, grad_x, None, None, None


def encode_pairs(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    pre: Tensor,
    index: PairIndex,
    scale: Tensor | None = None,
) -> Tensor:
    """The pre-activations of selected pairs, differentiable with respect to all of the encoder's inputs.

    Args:
        x (`Tensor` of shape `(N, D)`): Hidden states.
        W_enc (`Tensor` of shape `(F, D)`), b_enc (`Tensor` of shape `(F,)`): Encoder.
        b_dec (`Tensor` of shape `(D,)` or `None`): Subtracted from the input, where the family does.
        pre (`Tensor` of shape `(M,)`): The value of each pair, as the selection found it.
        index ([`PairIndex`]): The selected pairs.
        scale (`Tensor` of shape `(F,)`, *optional*): Factor of each latent, already in `pre`.

    Returns:
        `Tensor` of shape `(M,)`.
    """
    return _EncodePairs.apply(x, W_enc, b_enc, b_dec, scale, pre.detach(), index)


def decode_prefixes(pairs: LatentPairs, W_dec: Tensor, widths: list[int]) -> Tensor:
    """The reconstruction of every prefix, without `b_dec`, in one pass.

    Args:
        pairs ([`LatentPairs`]): The latents; those past the last width are not allowed.
        W_dec (`Tensor` of shape `(F, D)`): Decoder.
        widths (`list[int]`): P strictly increasing widths.

    Returns:
        `Tensor` of shape `(P, N, D)`.
    """
    groups = _DecodeGroups.apply(pairs.values, W_dec, pairs.index, tuple(widths))
    return groups.cumsum(1).transpose(0, 1)


def prefix_errors(
    pairs: LatentPairs,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor,
    widths: list[int],
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """The squared error of every prefix, at the cost of one decode.

    Args:
        pairs ([`LatentPairs`]), W_dec (`Tensor` of shape `(F, D)`), widths (`list[int]`): As in [`decode_prefixes`].
        b_dec (`Tensor` of shape `(D,)`): Part of every reconstruction.
        x (`Tensor` of shape `(N, D)`): What is reconstructed.
        layout ([`Layout`], *optional*): With shards, pairs, rows and widths are those of this process, and the errors
            are those of the whole dictionary. Gradients to `b_dec` are then to be summed over the shards.

    Returns:
        The errors `(P,)`, summed over D and averaged over tokens, and the residual `x - reconstruction` `(N, D)` of
        the last prefix; both differentiable.
    """
    return _PrefixErrors.apply(pairs.values, W_dec, b_dec, x, pairs.index, tuple(widths), layout)
