"""A trained dictionary gains latents: those it has become the first prefixes, new ones follow as outer groups.

A frozen base stays bit for bit what it was. Training runs in normalised units, and folding these in and out rounds;
only `b_enc`, `b_dec` and the thresholds are touched by that, so their raw values are kept and put back at the end.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...models import MatryoshkaSAE, MatryoshkaSAEConfig, SAEConfig, SAEModel
from ...models.configuration_sae import PREFIX_ACTIVATIONS
from ...models.encoder_blocks import EncoderBlocks
from ...models.families import BatchTopK
from ...models.selection import Selection, select_above, select_batch_topk
from ...models.sharding import Layout, all_sum
from ..config.spec import SAESpec
from .initialization import initialize
from .losses import level_weights


_ROWS = 1024  # hidden states of the sample that are encoded at once


@torch.no_grad()
def grow(
    sae: SAEModel,
    num_latents: int,
    seed: int = 0,
    sample: Tensor | None = None,
    k: int | float | None = None,
    prefix_widths: list[int] | None = None,
    spec: SAESpec | None = None,
) -> MatryoshkaSAE:
    """A larger dictionary whose first latents are those of `sae`, weights and ids unchanged.

    Cut back to the size of `sae` it encodes and decodes the same hidden states to the same values; for TopK as long as
    `k` is the same. The new latents still have to be trained: see `grow_from` of a run.

    Args:
        sae ([`SAEModel`]): Of any family but Gated.
        num_latents (`int`): Size of the larger dictionary.
        seed (`int`, *optional*, defaults to 0): Of the new latents.
        sample (`Tensor` of shape `(N, D)`, *optional*):
            Hidden states in the units of `sae`. The new latents then point at what `sae` leaves of some of them, drawn
            in proportion to the squared error.
        k (`int` or `float`, *optional*): Of the larger dictionary; by default that of `sae`.
        prefix_widths (`list[int]`, *optional*): Those of `sae` and more; by default those of `sae` and `num_latents`.
        spec ([`SAESpec`], *optional*): How new weights begin; by default as a run of this family would.

    Returns:
        [`MatryoshkaSAE`] of the same activation. New latents have thresholds as high as the others' mean.

    Raises:
        `ValueError`: if the family cannot grow, a size does not fit, or the sample has no finite row of width D.
    """
    grown = MatryoshkaSAE(_larger(sae.config, num_latents, k, prefix_widths)).to(sae.W_enc).train(sae.training)
    spec = spec or SAESpec.from_dict({"activation": grown.config.activation}, "")
    base = sae.config.num_latents
    initialize(grown, spec, sae.b_dec[None], sae.b_dec, seed)
    if sample is not None:
        _aim_at_residual(grown, sae, sample, spec, seed)
    if not grown.config.apply_b_dec_to_input:
        grown.b_enc.copy_(-(grown.W_enc @ sae.b_dec))  # as if it were
    if hasattr(grown, "threshold"):
        grown.threshold.data = grown.threshold.data.to(sae.threshold.dtype)
        grown.threshold.fill_(sae.threshold.mean())
    ids = torch.arange(num_latents - base, device=sae.latent_ids.device)
    grown.latent_ids[base:] = ids + sae.latent_ids.max() + 1
    for name, tensor in sae.state_dict().items():
        grown.state_dict()[name][: len(tensor)].copy_(tensor)
    return grown


def _larger(base: SAEConfig, num_latents: int, k: int | float | None, widths: list[int] | None) -> MatryoshkaSAEConfig:
    """The config of the larger dictionary."""
    if base.activation_name not in PREFIX_ACTIVATIONS:
        raise ValueError(
            f"A {base.activation_name} SAE cannot grow: a Matryoshka SAE is one of {', '.join(PREFIX_ACTIVATIONS)}."
        )
    if num_latents <= base.num_latents:
        raise ValueError(f"`num_latents` ({num_latents}) must be larger than the {base.num_latents} latents to grow.")
    widths = [*base.widths, num_latents] if widths is None else list(widths)
    if widths[: len(base.widths)] != base.widths:
        raise ValueError(f"`prefix_widths` must begin with those of the SAE to grow, {base.widths}; got {widths}.")
    kept = ("d_in", "apply_b_dec_to_input", "scale_by_decoder_norm", "base_model", "hookpoint")
    kept += tuple(name for name in ("k", "bandwidth", "initial_threshold") if hasattr(base, name))
    fields = {name: getattr(base, name) for name in kept} | ({} if k is None else {"k": k})
    return MatryoshkaSAEConfig(
        num_latents=num_latents, activation=base.activation_name, prefix_widths=widths, **fields
    )


def _aim_at_residual(grown: SAEModel, sae: SAEModel, sample: Tensor, spec: SAESpec, seed: int) -> None:
    """Turn the new latents towards residuals of `sae`; those beyond the sample's size keep their random directions."""
    base, count = sae.config.num_latents, grown.config.num_latents - sae.config.num_latents
    rows = _finite_rows(sample, sae)
    residual = torch.cat([x - sae.decode_pairs(_at_inference(sae, x), [base])[0] for x in rows.split(_ROWS)])
    odds = residual.double().square().sum(1).cpu()
    count = min(count, int((odds > 0).sum()))
    if not count:
        return
    # Gumbel top-k in place of multinomial: no limit on the number of rows.
    noise = torch.rand(len(odds), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = (odds.log() - (-noise.clamp(min=1e-300).log()).log()).topk(count).indices.to(residual.device)
    chosen = residual[drawn] / residual[drawn].norm(dim=1, keepdim=True)
    grown.W_dec[base : base + count] = chosen * spec.decoder_init_norm
    if spec.encoder_init == "decoder":
        grown.W_enc[base : base + count] = chosen * (spec.decoder_init_norm * spec.encoder_init_scale)


def _finite_rows(sample: Tensor, sae: SAEModel) -> Tensor:
    if sample.ndim != 2 or sample.shape[1] != sae.config.d_in:
        raise ValueError(f"`sample` must be of shape (N, {sae.config.d_in}), got {tuple(sample.shape)}.")
    rows = sample[sample.isfinite().all(-1)].to(sae.W_enc)
    if not len(rows):
        raise ValueError(f"`sample` has no row of finite hidden states, out of {len(sample)}.")
    return rows


def _at_inference(sae: SAEModel, x: Tensor) -> Any:
    training = sae.training
    try:
        return sae.eval().encode_pairs(x)
    finally:
        sae.train(training)


def grown_start(
    start: SAEModel, spec: SAESpec, hookpoint: str, mean: Tensor, scale: float, sample: Tensor, seed: int
) -> tuple[MatryoshkaSAE, "FrozenBase | None"]:
    """Return the SAE that a run with `grow_from` trains, in its units, and the base that it keeps.

    Args:
        start ([`SAEModel`]): The SAE to grow, taking raw hidden states; changed.
        spec ([`SAESpec`]): Size, k and objective.
        hookpoint (`str`): Hookpoint of the run.
        mean (`Tensor` of shape `(D,)`): Mean of the run's normalisation.
        scale (`float`): Scale of the run's normalisation.
        sample (`Tensor` of shape `(N, D)`): Some raw hidden states.
        seed (`int`): Seed of the new latents.

    Raises:
        `ValueError`: if the SAE is of another hookpoint or activation, cannot grow, or leaves no room for new latents.
    """
    if start.config.hookpoint not in (None, hookpoint):
        raise ValueError(f"`grow_from: {spec.grow_from}` was trained at {start.config.hookpoint}, not at {hookpoint}.")
    activation = start.config.activation_name
    if activation in PREFIX_ACTIVATIONS and activation != (spec.activation or "batch_topk"):
        raise ValueError(
            f"`grow_from: {spec.grow_from}` holds a {activation} SAE. Say `activation: {activation}`, so that the "
            "settings left out are those for it."
        )
    start = start.float().to(sample.device).eval()
    if spec.unit_norm_decoder and not spec.freeze_base:
        start.fold_decoder_norm_()
    base = FrozenBase(start) if spec.freeze_base else None
    start.fold_normalization_(-mean / scale, 1 / scale)
    sample = (sample - mean) / scale
    sae = grow(start, spec.num_latents, seed, sample, spec.k, spec.prefix_widths, spec)
    if base is not None:
        _check_room(start, sae, spec, sample)
        for progress in (0.0, 1.0):
            base.outer_weights(level_weights(spec, len(sae.prefix_widths), progress), sae.prefix_widths)
    return sae, base


def _check_room(base: SAEModel, sae: SAEModel, spec: SAESpec, sample: Tensor) -> None:
    """A frozen base keeps firing as it does; raise `ValueError` where that is all that may fire."""
    activation = sae.config.activation
    name, limit = ("k", sae.config.k) if activation == "batch_topk" else ("target_l0", spec.target_l0)
    if activation == "topk" or limit is None:
        return
    rows = _finite_rows(sample, base)
    fired = sum(int((_at_inference(base, x).values > 0).sum()) for x in rows.split(_ROWS)) / len(rows)
    if activation == "batch_topk":
        fired = max(fired, base.config.k)
    if fired >= limit:
        raise ValueError(
            f"`{name}` ({limit:g}) leaves no room for new latents: the frozen base alone fires {fired:.4g} per token. "
            f"Give a larger `{name}`, for example {math.ceil(1.5 * fired)}, or `freeze_base: false`."
        )


class FrozenBase:
    """The first latents of a dictionary in training, and `b_dec`, kept as they are.

    Args:
        sae ([`SAEModel`]): The base, taking raw hidden states.
    """

    def __init__(self, sae: SAEModel) -> None:
        self.width = sae.config.num_latents
        kept = ("b_enc", "b_dec", "threshold")
        self.raw = {name: tensor.clone() for name, tensor in sae.state_dict().items() if name in kept}

    def hold(self, sae: SAEModel) -> None:
        """Prepare the dictionary for training on this base."""
        sae.b_dec.requires_grad_(False)
        if sae.config.activation_name == "batch_topk":
            sae.family = BatchTopKOnBase(self.width)

    def outer_weights(self, weights: list[float], widths: list[int]) -> list[float]:
        """Weights of the levels with those that cannot change at 0 and the same sum.

        Args:
            weights (`list[float]`): What [`level_weights`] gives; that of `b_dec` alone may stand first.
            widths (`list[int]`): Prefix widths.

        Raises:
            `ValueError`: if all weight is on levels that cannot change.
        """
        fixed = len(weights) - sum(width > self.width for width in widths)
        outer = sum(weights[fixed:])
        if outer <= 0:
            raise ValueError(
                f"`level_weights` {weights} give the prefixes past the frozen base ({self.width} latents) no weight."
            )
        return [0.0] * fixed + [weight * sum(weights) / outer for weight in weights[fixed:]]

    def silence(self, sae: SAEModel) -> None:
        """Take the base's gradients away. Adam's moments of these rows then stay 0, and so do its steps."""
        for parameter in sae.parameters():
            if parameter.grad is not None:
                parameter.grad[: self.width] = 0

    @torch.no_grad()
    def copy_rows(self, target: SAEModel, source: SAEModel) -> None:
        """Give `target` the base's rows, and the `b_dec`, of `source`."""
        values = source.state_dict()
        for name, tensor in target.state_dict().items():
            rows = slice(None) if name == "b_dec" else slice(self.width)
            tensor[rows].copy_(values[name][rows])

    @torch.no_grad()
    def restore(self, sae: SAEModel) -> None:
        """Put back what rounding has touched, once `sae` takes raw hidden states."""
        for name, value in self.raw.items():
            getattr(sae, name)[: len(value)].copy_(value)


class BatchTopKOnBase(BatchTopK):
    """BatchTopK in training on a frozen base.

    The base fires above its thresholds, as it will at inference, and new latents compete for the places that are left
    of k per token.

    Args:
        width (`int`): Latents of the base.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def select(self, model: SAEModel, blocks: EncoderBlocks, layout: Layout | None) -> Selection:
        """Tokens, latents and pre-activations of the pairs that take part."""
        if not model.training:
            return super().select(model, blocks, layout)
        rows, cols, pre = select_above(blocks.latents(0, self.width), model.threshold[: self.width].clamp(min=0))
        layout = layout or Layout(blocks.num_latents)
        assert layout.shards == 1, "a frozen base is not sharded"
        tokens = max(1, blocks.num_rows * layout.replicas)
        left = int(model.k * tokens) - int(all_sum(rows.new_tensor(len(rows)), layout.group))
        # Half a place more: the product with `tokens` must not round below the whole number.
        outer = select_batch_topk(blocks.latents(self.width, None), (max(0, left) + 0.5) / tokens, layout)
        order = torch.cat([rows, outer[0]]).argsort(stable=True)
        joined = (rows, outer[0]), (cols, outer[1] + self.width), (pre, outer[2])
        return tuple(torch.cat(parts)[order] for parts in joined)
