"""The objectives of the families.

    L = sum_p w_p * error_p  +  sparsity penalty (relu, jumprelu, gated)  +  AuxK (latents that died)

error_p is the squared error of prefix p, summed over D and averaged over tokens unless the spec says otherwise. Every
quantity that is not linear in the batch (BatchTopK's cut, variances, L0 against a target) is taken over the joined
batch of all processes, so that averaged gradients equal those of one process. Of a sharded dictionary every process
knows the whole loss, and has the gradients of its own latents; that of b_dec is the sum over the shards.

Shapes: N tokens of this process, D `d_in`, F `num_latents`, P prefixes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ...models import SAEModel
from ...models.encoder_blocks import EncoderBlocks
from ...models.selection import select_topk
from ...models.sharding import Layout, all_sum
from ...models.sparse_ops import LatentPairs, PairIndex, at_least_float32, encode_pairs, prefix_errors
from ..config.spec import SAESpec


LOG_UNIT = 0.1
"""Strength from which on the `log` penalty grows with its logarithm: log(1 + s / 0.1), as Nabeshima (2024) has it."""


def level_weights(spec: SAESpec, num_prefixes: int, progress: float = 0.0) -> list[float]:
    """Weight of each prefix's error; with `bias_level` that of `b_dec` alone stands first.

    Args:
        spec ([`SAESpec`]): Its `level_weights`, `level_weights_end`, `balance` and `bias_level` are read.
        num_prefixes (`int`): P, without the bias level.
        progress (`float`, *optional*, defaults to 0): Share of the way to `level_weights_end`.

    Raises:
        `ValueError`: for a list of another length.
    """
    weights = _weights_of(spec.level_weights, spec, num_prefixes + spec.bias_level)
    if spec.level_weights_end is None:
        return weights
    last = _weights_of(spec.level_weights_end, spec, num_prefixes + spec.bias_level)
    return [(1 - progress) * a + progress * b for a, b in zip(weights, last, strict=True)]


def _weights_of(scheme: str | list[float], spec: SAESpec, count: int) -> list[float]:
    if isinstance(scheme, list):
        if len(scheme) != count:
            raise ValueError(f"`level_weights` needs {count} numbers, one for each level; got {scheme}.")
        return [float(weight) for weight in scheme]
    if scheme == "mean":
        return [1 / count] * count
    if scheme == "sum":
        return [1.0] * count
    if scheme == "mean_squared":
        return [1 / count**2] * count
    if scheme in _INNER_SHARES:
        return _shared(*_INNER_SHARES[scheme], count)
    assert scheme == "balance", scheme
    weights = [spec.balance ** (count - level) for level in range(1, count + 1)]
    return [weight / count for weight in weights] if spec.balance > 1 else weights


# The share of the inner prefixes together, and the power of a prefix's place i that its part is proportional to. Found
# on small models (benchmarks/README.md): where a run begins with the first and ends with the second, the whole
# dictionary loses least for prefixes that are as good.
_INNER_SHARES = {"inner": (0.68, -0.4), "whole": (0.35, 0.0)}


def _shared(share: float, power: float, count: int) -> list[float]:
    """Return P weights that sum to 1: `share` over the inner prefixes, the i-th as i^power, the rest for the whole.

    The last inner prefix gets half of its part: it is nearly half of the dictionary, and the whole holds it too.
    """
    inner = [i**power for i in range(1, count)]
    inner[-1:] = [weight / 2 for weight in inner[-1:]]
    return [*(share * weight / sum(inner) for weight in inner), 1 - share] if inner else [1.0]


def variance(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`mean over tokens of ||x - mean||^2` over the joined batch, for `(N, D)` rows; no gradient."""
    x = x.detach().to(at_least_float32(x.dtype))
    # One reduction: the sum of rows, the sum of squares, the count.
    packed = torch.cat([x.sum(0), x.square().sum()[None], x.new_full((1,), float(len(x)))])
    *total, squares, count = all_sum(packed, group).split([x.shape[1], 1, 1])
    return ((squares - total[0].square().sum() / count) / count).clamp(min=0).squeeze()


class Objective(nn.Module):
    """The SAE and its loss as one module, so that data-parallel wrappers see one forward pass.

    Args:
        sae ([`SAEModel`]): Trained in normalised units.
        spec ([`SAESpec`]): Which objective.
        layout ([`Layout`], *optional*): Processes that share one batch or one dictionary.
    """

    def __init__(self, sae: SAEModel, spec: SAESpec, layout: Layout | None = None) -> None:
        super().__init__()
        if spec.multi_topk and sae.config.activation_name != "topk":
            raise ValueError(f"`multi_topk` is for TopK, not for {sae.config.activation_name}.")
        self.sae, self.spec = sae, spec
        self.layout = layout or Layout(sae.config.num_latents)

    def forward(
        self,
        x: Tensor,
        dead: Tensor | None,
        widths: list[int],
        weights: list[float],
        sparsity: Tensor | float,
        num_dead: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            x (`Tensor` of shape `(N, D)`): Normalised hidden states.
            dead (`Tensor`, *optional*): The dead latents of this process, ascending; `None` where the whole dictionary
                has none.
            widths (`list[int]`): Prefix widths of this step, of the whole dictionary.
            weights (`list[float]`): What [`level_weights`] gives for them.
            sparsity (`Tensor` or `float`): Coefficient of the sparsity penalty.
            num_dead (`int`, *optional*): Dead latents of the whole dictionary; by default those of `dead`.

        Returns:
            The loss, and detached statistics of this process: `sse` (P,), `auxk`, `mean` (D,) and `square` of x; of
            its latents alone `l0`, `fired` (F,) and, with `sort_every`, `energy` (F,): the mean of `(a * ||d||)^2`.
        """
        loss, pairs, sse, residual = self._reconstruct(x, widths, weights)
        if isinstance(sparsity, Tensor) or sparsity:
            loss = loss + sparsity * self._penalty(pairs, widths, weights)
        if self.sae.config.activation_name == "gated":
            loss = loss + self._gate_error(x, pairs)
        if self.sae.config.activation_name == "jumprelu" and pairs.gate is None:
            loss = loss + 0 * self.sae.threshold.sum()  # DDP waits for a gradient of every parameter
        auxk = loss.new_zeros(())
        if self.spec.auxk_coefficient and dead is not None:
            auxk = self._auxk(x, residual, dead, len(dead) if num_dead is None else num_dead)
            loss = loss + self.spec.auxk_coefficient * auxk
        return loss, self._statistics(pairs, sse.detach(), x, auxk)

    def _reconstruct(
        self, x: Tensor, widths: list[int], weights: list[float]
    ) -> tuple[Tensor, LatentPairs, Tensor, Tensor]:
        """The weighted error, the latents, the error of each prefix and the residual of the last."""
        spec = self.spec
        if spec.multi_topk:
            k = int(self.sae.k)
            with _annealed(self.sae, min(4 * k, widths[-1])):
                wide = self.sae.encode_pairs(x, layout=self.layout)
        if spec.multi_topk and self.layout.shards == 1:
            pairs = wide.keep(_best(wide, k))
        else:
            pairs = self.sae.encode_pairs(x, layout=self.layout)
        sse, residual = self.sae.prefix_errors(pairs, x, widths, layout=self.layout)
        error = self._weighted(sse, x, weights)
        if spec.multi_topk:
            wider = self.sae.prefix_errors(wide, x, widths, layout=self.layout)[0]
            error = error + self._weighted(wider, x, weights) / 8  # Multi-TopK: L(k) + L(4k) / 8
        return error, pairs, sse, residual

    def _weighted(self, sse: Tensor, x: Tensor, weights: list[float]) -> Tensor:
        levels = list(sse.unbind())
        if self.spec.bias_level:
            b_dec = self.sae.b_dec if self.layout.shard == 0 else self.sae.b_dec.detach()  # shards' gradients add up
            levels = [_mean_square(b_dec - x), *levels]
        # Numbers, not a tensor of weights: nothing is copied to the device.
        error = sum(weight * level for weight, level in zip(weights, levels, strict=True))
        if self.spec.error_unit == "mean":
            return error / x.shape[1]
        return error / variance(x, self.layout.replica_group) if self.spec.error_unit == "fvu" else error

    def _penalty(self, pairs: LatentPairs, widths: list[int], weights: list[float]) -> Tensor:
        name, num_rows = self.sae.config.activation_name, pairs.num_rows
        if name == "jumprelu":
            l0 = pairs.gate.sum() / num_rows
            if self.spec.target_l0 is None:
                return self._over_shards(l0)
            # The value of the joined batch with the gradient of this process's share.
            l0 = l0 + all_sum(l0, self.layout.group) / self.layout.replicas - l0.detach()
            return (l0 / self.spec.target_l0 - 1).square()
        strength = torch.relu(pairs.gate) if name == "gated" else pairs.values
        strength = strength * self.sae.W_dec.norm(dim=1)[pairs.cols]
        if self.spec.sparsity_penalty == "log":
            strength = torch.log1p(strength / LOG_UNIT)
        # A latent pays in every prefix that holds it; a share of the penalty may be the same for all.
        nested, levels = self.spec.nested_penalty, weights[-len(widths) :]
        own = zip(self.layout.own_widths(widths), levels, strict=True)
        share = (1 - nested) + sum((pairs.cols < width) * (nested * level / sum(levels)) for width, level in own)
        return self._over_shards((strength * share).sum() / num_rows)

    def _over_shards(self, value: Tensor) -> Tensor:
        """The sum over the shards with the gradient of this process's part."""
        if self.layout.shards == 1:
            return value
        return value + (all_sum(value, self.layout.shard_group) - value.detach())

    def _gate_error(self, x: Tensor, pairs: LatentPairs) -> Tensor:
        """`||x - (relu(gate) W_dec + b_dec)||^2` with a frozen decoder (arXiv 2404.16014, eq. 8)."""
        gate = pairs.with_values(torch.relu(pairs.gate))
        return self.sae.prefix_errors(gate, x, [self.layout.num_latents], frozen=True, layout=self.layout)[0][0]

    def _auxk(self, x: Tensor, residual: Tensor, dead: Tensor, num_dead: int) -> Tensor:
        """What the dead latents that come nearest to firing leave of the residual (arXiv 2406.04093, section A.2).

        `residual` is x - reconstruction: b_dec is taken off once, and what is decoded here adds none.
        """
        spec, sae = self.spec, self.sae
        wanted = spec.auxk_k or max(1, x.shape[1] // 2)
        if spec.auxk_detach_residual:
            residual = residual.detach()
        # Sparse gradients: rows of latents that are alive are not touched.
        W_enc, W_dec = (embedding(dead, W, sparse=True).to(sae.b_enc.dtype) for W in (sae.W_enc, sae.W_dec))
        b_enc, b_dec = sae.b_enc[dead], sae.b_dec if sae.config.apply_b_dec_to_input else None
        if sae.config.scale_by_decoder_norm:
            norms = W_dec.norm(dim=1)
            W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
        latents = _Dead(W_enc, b_enc, b_dec, W_dec, torch.relu if spec.auxk_rectify else torch.clone)
        if self.layout.shards == 1 and num_dead <= _DENSE_AUXK * wanted:
            error = _few_dead(x, residual, latents, wanted)
        else:
            error = _many_dead(x, residual, latents, wanted, self.layout)
        if spec.error_unit == "mean":
            error = error / x.shape[1]
        if spec.auxk_normalize:
            spread = variance(residual, self.layout.replica_group)
            spread = spread / x.shape[1] if spec.error_unit == "mean" else spread
            error = torch.where(spread > 0, error / spread.clamp(min=torch.finfo(spread.dtype).tiny), 0.0)
        return error * min(num_dead / wanted, 1.0) if spec.auxk_scale_by_dead else error

    @torch.no_grad()
    def _statistics(self, pairs: LatentPairs, sse: Tensor, x: Tensor, auxk: Tensor) -> dict[str, Tensor]:
        active = pairs.values > 0
        fired = torch.zeros(pairs.num_latents, device=x.device)
        fired.index_add_(0, pairs.cols, active.float())
        statistics = {
            "sse": sse.float(),
            "mean": x.mean(0).float(),
            "square": torch.linalg.vector_norm(x, dim=1, dtype=at_least_float32(x.dtype)).square().mean().float(),
            "l0": active.sum().float() / pairs.num_rows,
            "fired": fired,
            "auxk": auxk.detach().float(),
        }
        if self.spec.sort_every:
            squares = pairs.values.to(at_least_float32(pairs.values.dtype)).square()
            energy = torch.zeros_like(fired).index_add_(0, pairs.cols, squares.float())
            if not self.spec.unit_norm_decoder:
                W_dec = self.sae.W_dec
                energy *= torch.linalg.vector_norm(W_dec, dim=1, dtype=at_least_float32(W_dec.dtype)).square().float()
            statistics["energy"] = energy / pairs.num_rows
        return statistics


# Up to so many times the places to be filled, all dead latents are computed: three small matmuls are cheaper than the
# pairs, of which a token has half of D.
_DENSE_AUXK = 4
# Half the capacity factor of the other latents: a token has more places for dead ones, so that the share of a shard
# varies less.
_AUXK_CAPACITY = 2.0


class _Dead(NamedTuple):
    """The weights of the dead latents of this process, and what makes values of their pre-activations."""

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor | None
    W_dec: Tensor
    activation: Callable[[Tensor], Tensor]


def _few_dead(x: Tensor, residual: Tensor, latents: _Dead, wanted: int) -> Tensor:
    """The error of the `wanted` nearest dead latents of each token, by dense autograd over the dead alone."""
    W_enc, b_enc, b_dec, W_dec, activation = latents
    values = linear(x if b_dec is None else x - b_dec, W_enc, b_enc).to(W_enc.dtype)
    if len(W_enc) > wanted:
        best = values.detach().topk(wanted, dim=-1, sorted=False).indices
        values = values * torch.zeros_like(values).scatter_(1, best, 1.0)
    return _mean_square(activation(values) @ W_dec - residual)


def _many_dead(x: Tensor, residual: Tensor, latents: _Dead, wanted: int, layout: Layout) -> Tensor:
    """The same from pairs; of the dead of all shards, each of which may have none."""
    W_enc, b_enc, b_dec, W_dec, activation = latents
    blocks = EncoderBlocks(x.detach(), W_enc.detach(), b_enc.detach(), None if b_dec is None else b_dec.detach())
    factor = min(layout.capacity_factor, _AUXK_CAPACITY)
    rows, cols, pre = select_topk(blocks, wanted, layout=layout, capacity_factor=factor)
    index = PairIndex(rows, cols, len(x), len(W_enc))
    values = activation(encode_pairs(x, W_enc, b_enc, b_dec, pre, index))
    pairs, no_bias = LatentPairs(index, values), W_dec.new_zeros(x.shape[1])
    return prefix_errors(pairs, W_dec, no_bias, residual, [len(W_dec)], layout)[0][0]


def _mean_square(rows: Tensor) -> Tensor:
    """`mean over rows of ||row||^2`, for `(N, D)` rows."""
    return rows.to(at_least_float32(rows.dtype)).square().sum(-1).mean()


@contextmanager
def _annealed(sae: SAEModel, k: float) -> Iterator[None]:
    before, sae.k = sae.k, k
    try:
        yield
    finally:
        sae.k = before


def _best(pairs: LatentPairs, k: int) -> Tensor:
    """The k largest of each token's pairs, of which each token has as many."""
    values = pairs.values.detach().view(pairs.num_rows, -1)
    best = values.topk(min(k, values.shape[1]), dim=-1, sorted=False).indices.sort(dim=-1).values
    return (best + torch.arange(len(values), device=values.device)[:, None] * values.shape[1]).flatten()
