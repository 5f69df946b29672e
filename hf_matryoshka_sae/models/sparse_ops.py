"""The sparse operations every family is made of.

After the encoder's matmul nothing of size N x F is built again: a selection gives (token, latent) pairs once, and both
the encoder and the decoder get gradients through those pairs alone.

Shapes: N tokens, D `d_in`, F `num_latents`, K slots, P prefixes, M pairs. Pairs are sorted by token, then by latent.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class SparseLatents:
    """Latents of a batch as padded (value, index) slots.

    Args:
        values (`Tensor` of shape `(..., K)`): Activations; a padded slot is 0.
        indices (`Tensor` of shape `(..., K)`): Latents, ascending; a padded slot is 0.
        num_latents (`int`): Size F of the dictionary.
    """

    values: Tensor
    indices: Tensor
    num_latents: int

    def to_dense(self) -> Tensor:
        """The same activations as a `(..., F)` tensor."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.num_latents)
        # scatter_add: padded slots add 0 to latent 0 instead of overwriting it.
        return dense.scatter_add(-1, self.indices, self.values)

    def l0(self) -> Tensor:
        """Number of latents that fire, per token."""
        return (self.values > 0).sum(-1)


@dataclass
class LatentPairs:
    """Latents of a batch as a list of (token, latent, value) sorted by token, then by latent.

    Args:
        rows (`Tensor` of shape `(M,)`): Token of each pair.
        cols (`Tensor` of shape `(M,)`): Latent of each pair.
        values (`Tensor` of shape `(M,)`): Activation; differentiable.
        num_rows (`int`): N.
        num_latents (`int`): F.
        gate (`Tensor` of shape `(M,)`, *optional*):
            What a sparsity penalty acts on where that is not the value: JumpReLU's step, Gated's gate.
    """

    rows: Tensor
    cols: Tensor
    values: Tensor
    num_rows: int
    num_latents: int
    gate: Tensor | None = None

    def to_slots(self) -> SparseLatents:
        """Pad every token to the same number K of slots."""
        counts = torch.bincount(self.rows, minlength=self.num_rows)
        width = int(counts.max()) if self.num_rows else 0
        slot = torch.arange(len(self.rows), device=self.rows.device) - (counts.cumsum(0) - counts)[self.rows]
        values = self.values.new_zeros(self.num_rows, width).index_put((self.rows, slot), self.values)
        indices = self.cols.new_zeros(self.num_rows, width).index_put((self.rows, slot), self.cols)
        return SparseLatents(values, indices, self.num_latents)

    def keep(self, mask: Tensor) -> "LatentPairs":
        """Only the pairs where `mask` is true."""
        gate = None if self.gate is None else self.gate[mask]
        return LatentPairs(self.rows[mask], self.cols[mask], self.values[mask], self.num_rows, self.num_latents, gate)


def pairs_from_slots(values: Tensor, indices: Tensor, num_latents: int) -> LatentPairs:
    """The pairs of `(N, K)` slots; slots of value 0 are dropped, the order of a token's slots does not matter."""
    order = indices.argsort(dim=-1, stable=True)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    rows, slots = (values != 0).nonzero(as_tuple=True)
    return LatentPairs(rows, indices[rows, slots], values[rows, slots], len(values), num_latents)


# Selections. They see values only; gradients pass through the pairs they return.


def select_above(pre: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """Pairs of `pre` (`(N, F)`) strictly above `threshold` (a number or `(F,)`)."""
    return (pre > threshold).nonzero(as_tuple=True)


def select_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest entries of each row that are positive; of equal ones the lowest latent wins.

    Source: Gao et al. 2024 (arXiv 2406.04093), eq. 3, ReLU included.
    """
    num_latents = pre.shape[-1]
    k = min(k, num_latents)
    values, indices = pre.topk(min(k + 1, num_latents), dim=-1, sorted=True)
    tied = values[:, k - 1] == values[:, -1] if k < num_latents else None
    values, indices = values[:, :k], indices[:, :k]
    if tied is not None and bool((tied & (values[:, -1] > 0)).any()):
        # torch.topk leaves open which of several equal entries it returns; a stable sort does not.
        ordered = pre[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], indices[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    indices, order = indices.sort(-1)
    rows, slots = (values.gather(-1, order) > 0).nonzero(as_tuple=True)
    return rows, indices[rows, slots]


def select_batch_topk(pre: Tensor, k: float, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """The `int(k * N)` largest entries of the whole batch that are positive (Bussmann et al. 2024, arXiv 2412.06410).

    Of equal entries the lowest (token, latent) wins. With `group` the batch is the joined batch of its processes, in
    the order of their ranks.

    Args:
        pre (`Tensor` of shape `(N, F)`): Pre-activations; every process of `group` holds as many rows.
        k (`float`): Latents kept per token on average.
        group (`ProcessGroup`, *optional*): Processes that share one batch.

    Returns:
        The tokens and the latents of the pairs.
    """
    world = dist.get_world_size(group) if group is not None else 1
    count = min(int(k * len(pre) * world), pre.numel() * world)
    flat = pre.flatten()
    candidates = _largest(flat, min(count, flat.numel()))
    if world > 1:
        candidates = _cut_over_processes(flat, candidates, count, group)
    return candidates // pre.shape[1], candidates % pre.shape[1]


def _largest(flat: Tensor, count: int) -> Tensor:
    """Positions, ascending, of the `count` largest positive entries; of equal ones the first win."""
    if count == 0:
        return flat.new_empty(0, dtype=torch.int64)
    floor = _quantile_floor(flat, count)
    candidates = (flat > floor).nonzero().squeeze(1)
    if len(candidates) < count and floor > 0:
        candidates = (flat > 0).nonzero().squeeze(1)
    if len(candidates) <= count:
        return candidates
    values = flat[candidates]
    cut = values.topk(count, sorted=False).values.min()
    return candidates[_above_or_first(values, cut, count)]


def _quantile_floor(flat: Tensor, count: int, sample: int = 65536) -> float:
    """A value that most likely has somewhat more than `count` entries above it, from an evenly spaced sample."""
    stride = max(1, flat.numel() // sample)
    drawn = flat[::stride]
    # Four standard deviations of the count's sampling error, so that the slow path is rare.
    expected = count / stride
    rank = int(expected + 4 * expected**0.5 + 8)
    if rank >= drawn.numel():
        return 0.0
    return max(0.0, drawn.topk(rank, sorted=False).values.min().item())


def _above_or_first(values: Tensor, cut: Tensor, count: int) -> Tensor:
    """Mask of the entries above `cut`, filled up to `count` with the first of those equal to it."""
    above, equal = values > cut, values == cut
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def _cut_over_processes(flat: Tensor, candidates: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """Of each process's candidates, those among the `count` largest of all processes."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    values = flat[candidates]
    padded = values.new_zeros(min(count, flat.numel()))
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    joined = torch.cat(gathered)
    cut = joined.topk(count, sorted=False).values.min()
    above = joined > cut
    equal_before = sum(int((part == cut).sum()) for part in gathered[:rank])
    room = count - int(above.sum()) - equal_before
    mine_above, mine_equal = values > cut, (values == cut) & (values > 0)
    return candidates[mine_above | (mine_equal & (mine_equal.cumsum(0) <= room))]


# Differentiable operations.


def _gather_sum(values: Tensor, source: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """`out[b] = sum of values[m] * source[index[m]]` over the `counts[b]` consecutive pairs of bag b."""
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(index, source, offsets, mode="sum", per_sample_weights=values.to(source.dtype))


def _pair_dot(left: Tensor, bags: Tensor, right: Tensor, cols: Tensor) -> Tensor:
    """`out[m] = <left[bags[m]], right[cols[m]]>`, with no [M, D] block in between.

    This is embedding_bag's own backward pass for its weights; called directly because autograd offers it only together
    with a second forward pass, and gathering both sides is 10 to 30 times slower on a CPU.
    """
    counts = torch.bincount(bags, minlength=len(left))
    offsets = counts.cumsum(0) - counts
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.to(right.dtype), right, cols, offsets, bags, 0, -1
    )


class _EncodePairs(torch.autograd.Function):
    """`pre[rows, cols]` of `pre = (x - b_dec) W_enc^T + b_enc`, with gradients from those pairs alone."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, pre, rows, cols):
        ctx.save_for_backward(x, W_enc, b_dec, rows, cols)
        return pre[rows, cols]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W_enc, b_dec, rows, cols = ctx.saved_tensors
        need_x, need_W, need_b, need_b_dec = ctx.needs_input_grad[:4]
        grad = grad.to(W_enc.dtype)
        grad_b = W_enc.new_zeros(len(W_enc)).index_add_(0, cols, grad)
        grad_x = grad_W = grad_b_dec = None
        if need_x:
            grad_x = _gather_sum(grad, W_enc, cols, torch.bincount(rows, minlength=len(x))).to(x.dtype)
        if need_W:
            order = cols.argsort(stable=True)
            centred = (x if b_dec is None else x - b_dec).to(W_enc.dtype)
            counts = torch.bincount(cols, minlength=len(W_enc))
            grad_W = _gather_sum(grad[order], centred, rows[order], counts)
        if need_b_dec:
            grad_b_dec = -(grad_b @ W_enc)  # the batch is summed before the mat-vec
        return grad_x, grad_W, grad_b if need_b else None, grad_b_dec, None, None, None


class _DecodePrefixes(torch.autograd.Function):
    """All prefix reconstructions (without the bias) in one pass over the pairs.

    Forward: y_g = the sum over group g's pairs; the reconstruction of prefix p is the running sum of y. Backward: with
    G_p the gradient of prefix p, a pair of group g sees S_g = the sum of G_p over p >= g.
    """

    @staticmethod
    def forward(ctx, values, W_dec, rows, cols, widths, num_rows):
        edges = torch.tensor(widths, device=cols.device)
        bags = rows * len(widths) + torch.bucketize(cols, edges, right=True)
        counts = torch.bincount(bags, minlength=num_rows * len(widths))
        out = _gather_sum(values, W_dec, cols, counts).view(num_rows, len(widths), W_dec.shape[1])
        ctx.save_for_backward(values, W_dec, bags, cols)
        ctx.shape = out.shape
        return out.cumsum(1).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, W_dec, bags, cols = ctx.saved_tensors
        suffix = grad.flip(0).cumsum(0).flip(0).transpose(0, 1).reshape(-1, ctx.shape[-1])
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = _pair_dot(suffix, bags, W_dec, cols).to(values.dtype)
        if ctx.needs_input_grad[1]:
            order = cols.argsort(stable=True)
            counts = torch.bincount(cols, minlength=len(W_dec))
            grad_W = _gather_sum(values[order], suffix, bags[order], counts)
        return grad_values, grad_W, None, None, None, None


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """`(x - b_dec) W_enc^T + b_enc`, shape `(N, F)`."""
    return F.linear(x if b_dec is None else x - b_dec, W_enc, b_enc)


def encode_pairs(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, pre: Tensor, rows: Tensor, cols: Tensor
) -> Tensor:
    """The pre-activations of the selected pairs, differentiable with respect to all of the encoder's inputs.

    Args:
        x (`Tensor` of shape `(N, D)`): Hidden states.
        W_enc (`Tensor` of shape `(F, D)`), b_enc (`Tensor` of shape `(F,)`): Encoder.
        b_dec (`Tensor` of shape `(D,)` or `None`): Subtracted from the input, where the family does.
        pre (`Tensor` of shape `(N, F)`): What [`preactivations`] gave, without gradient.
        rows, cols (`Tensor` of shape `(M,)`): The selected pairs, sorted by token.

    Returns:
        `Tensor` of shape `(M,)`.
    """
    return _EncodePairs.apply(x, W_enc, b_enc, b_dec, pre.detach(), rows, cols)


def decode_prefixes(pairs: LatentPairs, W_dec: Tensor, widths: list[int]) -> Tensor:
    """The reconstruction of every prefix, without `b_dec`, in one pass.

    Args:
        pairs ([`LatentPairs`]): The latents; those past the last width are not allowed.
        W_dec (`Tensor` of shape `(F, D)`): Decoder.
        widths (`list[int]`): P strictly increasing widths.

    Returns:
        `Tensor` of shape `(P, N, D)`.
    """
    return _DecodePrefixes.apply(pairs.values, W_dec, pairs.rows, pairs.cols, tuple(widths), pairs.num_rows)


class _JumpReLU(torch.autograd.Function):
    """`z * H(z - theta)` and `H(z - theta)`, with rectangle-kernel gradients to theta (arXiv 2407.14435, eq. 11-12).

    The kernel sees the pre-activation z, so that thresholds feel latents on both sides of the jump. `theta` may be of
    higher precision than `z`: rounded to bf16 it would move past pre-activations.
    """

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        gate = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, gate)
        ctx.bandwidth = bandwidth
        return z * gate, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value, grad_gate):
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
