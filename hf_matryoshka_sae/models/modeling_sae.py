"""Sparse autoencoders as transformers models.

    pre  = W_enc (x - b_dec) + b_enc          (b_dec only where `apply_b_dec_to_input`)
    a    = what the family keeps of pre       (families.py)
    x^_p = W_dec[:p]^T a[:p] + b_dec          for every prefix width p

Shapes: N tokens, D `d_in`, F `num_latents`, K slots, P prefixes. Parameters are latent-major, so that the first n
latents are a contiguous run of bytes in the file.
"""

import os
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .checkpoint_files import complete_partial_files, failures_named, forget_partial_files, in_pieces, read_prefix
from .configuration_sae import (
    BatchTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAEConfig,
    ReluSAEConfig,
    SAEConfig,
    TopKSAEConfig,
    check_width,
)
from .families import FAMILIES
from .integration import Integration, forward_method, refuse_quantization
from .outputs import InputNorm, SAEOutput, SparseLatents, normalized
from .places import place_of_sae
from .refinement import select_pairs
from .reshaping import Reshaping
from .saving import Saving
from .selection import with_nan_rows
from .sharding import Layout
from .sparse_ops import (
    LatentPairs,
    PairIndex,
    at_least_float32,
    decode_prefixes,
    encode_pairs,
    pairs_from_slots,
    prefix_errors,
    row_norms,
)
from .weight_checks import check_numbers
from .whole_weights import check_whole


class SAEModel(Reshaping, Saving, Integration, PreTrainedModel):
    """What every family shares. Use one of its subclasses, or `AutoModel.from_pretrained`."""

    config_class = SAEConfig
    base_model_prefix = "sae"
    __call__: Callable[..., SAEOutput]  # for type checkers; that of `nn.Module` gives they know not what
    main_input_name = "hidden_states"
    model_tags = ["hf_matryoshka_sae", "sparse-autoencoder", "mechanistic-interpretability"]
    _no_split_modules = []
    # A threshold rounded to bf16 moves L0 by several per cent.
    _keep_in_fp32_modules_strict = {"threshold"}

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        num_latents, d_in = config.num_latents, config.d_in
        self.W_enc = nn.Parameter(torch.empty(num_latents, d_in))
        self.W_dec = nn.Parameter(torch.empty(num_latents, d_in))
        self.b_enc = nn.Parameter(torch.empty(num_latents))
        self.b_dec = nn.Parameter(torch.empty(d_in))
        self.register_buffer("latent_ids", torch.empty(num_latents, dtype=torch.int64))
        self.family = FAMILIES[config.activation_name]
        self.family.tensors(self, num_latents)
        self.k = getattr(config, "k", None)  # annealed by training; the config keeps the final value
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:
            return
        init.normal_(self.W_dec)
        norms = self.W_dec.norm(dim=1, keepdim=True).clamp(min=torch.finfo(self.W_dec.dtype).tiny)
        init.copy_(self.W_dec, self.W_dec / norms)
        init.copy_(self.W_enc, self.W_dec)
        init.zeros_(self.b_enc)
        init.zeros_(self.b_dec)
        init.copy_(self.latent_ids, torch.arange(len(self.latent_ids)))
        for name, value in self.family.initial(self).items():
            init.constant_(getattr(self, name), value)

    def extra_repr(self) -> str:
        """What `print(sae)` tells of it."""
        config = self.config
        fields = {name: getattr(config, name) for name in ("d_in", "num_latents", "activation_name")}
        if "topk" in config.activation_name:
            fields["k"] = self.k
        if len(self.prefix_widths) > 1:
            fields["prefix_widths"] = self.prefix_widths
        fields |= {name: getattr(config, name) for name in ("base_model", "hookpoint", "output_hookpoint")}
        fields["parameters"] = self.num_parameters()
        return ", ".join(f"{name}={value!r}" for name, value in fields.items() if value is not None)

    @property
    def prefix_widths(self) -> list[int]:
        """Widths at which the first latents are an SAE of their own; a plain SAE has `[F]`."""
        return self.config.widths

    # Encoding

    def normalized(self, x: Tensor) -> tuple[Tensor, InputNorm | None]:
        """What the encoder sees of `(N, D)` hidden states, and the shift and scale `(N, 1)` that decoding undoes.

        The hidden states themselves and `None` where the config has no `input_normalization`.
        """
        kind = self.config.input_normalization
        return (x, None) if kind is None else normalized(x.to(self.W_enc), kind)

    def encode_pairs(
        self,
        x: Tensor,
        width: int | None = None,
        selection: str = "restrict",
        layout: Layout | None = None,
    ) -> LatentPairs:
        """The latents of `(N, D)` hidden states as pairs; what training and [`encode`] are built on.

        Args:
            x (`Tensor` of shape `(N, D)`): Hidden states.
            width (`int`, *optional*): Only the first `width` latents.
            selection (`str`, *optional*, defaults to `"restrict"`):
                `"restrict"`: latents past `width` are never computed, so places are competed for inside the prefix;
                `"mask"`: all latents compete, then those past `width` are dropped.
            layout ([`Layout`], *optional*):
                Processes that share one batch or one dictionary in training; this one gets the pairs of its own.
        """
        if selection not in ("restrict", "mask"):
            raise ValueError(f"`selection` must be 'restrict' or 'mask', got {selection!r}.")
        width = self._checked_width(width)
        encoded = width if selection == "restrict" else self.config.num_latents
        b_dec = self.b_dec if self.config.apply_b_dec_to_input else None
        scale = row_norms(self.W_dec) if self.config.scale_by_decoder_norm else None
        x, input_norm = self.normalized(x)
        with torch.no_grad():
            rows, cols, pre = select_pairs(self, x, encoded, scale, layout)
            if layout is None:  # training sees to it that hidden states are finite, and looks at none
                rows, cols, pre = with_nan_rows((rows, cols, pre), x)
            if encoded > width:
                inside = cols < width
                rows, cols, pre = rows[inside], cols[inside], pre[inside]
        index = PairIndex(rows, cols, len(x), self.config.num_latents)
        selected = encode_pairs(x, self.W_enc, self.b_enc, b_dec, pre, index, scale)
        values, gate = self.family.values(self, selected, cols)
        return LatentPairs(index, values, gate, input_norm)

    @forward_method
    def encode(self, hidden_states: Tensor, width: int | None = None, selection: str = "restrict") -> SparseLatents:
        """Latents of hidden states.

        Args:
            hidden_states (`Tensor` of shape `(..., D)`): Raw hidden states; the normalisation is in the weights.
            width (`int`, *optional*): Only the first `width` latents.
            selection (`str`, *optional*, defaults to `"restrict"`): See [`encode_pairs`].

        Returns:
            [`SparseLatents`] with values and indices of shape `(..., K)`; of what is not finite NaN at latent 0 alone.

        Raises:
            `ValueError`: if the last dimension is not D, or the width is not between 1 and F.
        """
        flat = self._flattened(hidden_states)
        return _slots(self.encode_pairs(flat, width, selection), hidden_states.shape[:-1])

    # Decoding

    @forward_method
    def decode(self, latents: SparseLatents, width: int | None = None) -> Tensor:
        """The reconstruction `(..., D)` from the latents below `width`."""
        return self._decode(latents, [self._checked_width(width)])[0]

    @forward_method
    def decode_prefixes(self, latents: SparseLatents) -> Tensor:
        """The reconstruction of every prefix in one pass, shape `(P, ..., D)`."""
        return self._decode(latents, self.prefix_widths)

    def _decode(self, latents: SparseLatents, widths: list[int]) -> Tensor:
        leading = latents.values.shape[:-1]
        flat = (leading.numel(), latents.values.shape[-1])
        pairs = pairs_from_slots(latents.values.reshape(flat), latents.indices.reshape(flat), self.config.num_latents)
        if self.config.input_normalization is not None:
            if latents.input_norm is None:
                raise ValueError(
                    f"This SAE normalises each hidden state ({self.config.input_normalization}), and these latents do "
                    "not say how: pass what `encode` gives, with its `input_norm`."
                )
            shift, scale = (part.reshape(-1, 1) for part in latents.input_norm)
            pairs.input_norm = (shift, scale)
        return self.decode_pairs(pairs, widths).reshape(len(widths), *leading, self.config.d_in)

    def decode_pairs(self, pairs: LatentPairs, widths: list[int]) -> Tensor:
        """The reconstruction at each of `widths` (increasing) from pairs, shape `(P, N, D)`.

        Pairs without an `input_norm` give it in the units that the encoder sees.
        """
        prefixes = decode_prefixes(self._to_decode(pairs, widths, self.W_dec), self.W_dec, widths) + self.b_dec
        if pairs.input_norm is None:
            return prefixes
        shift, scale = pairs.input_norm
        return prefixes * scale + shift

    def prefix_errors(
        self, pairs: LatentPairs, x: Tensor, widths: list[int], frozen: bool = False, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """The squared error `(P,)` at each of `widths`, and the residual `(N, D)` of the last: what training needs.

        See [`sparse_ops.prefix_errors`]. With `frozen` the decoder gets no gradient; with shards in `layout`, `widths`
        are those of the whole dictionary, and the decodes of all shards are summed.
        """
        assert pairs.input_norm is None, "errors are those of what the encoder sees"
        W_dec, b_dec = (self.W_dec.detach(), self.b_dec.detach()) if frozen else (self.W_dec, self.b_dec)
        if layout is not None:
            widths = layout.own_widths(widths)
        return prefix_errors(self._to_decode(pairs, widths, W_dec), W_dec, b_dec, x, widths, layout)

    def _to_decode(self, pairs: LatentPairs, widths: list[int], W_dec: Tensor) -> LatentPairs:
        """The pairs below the last width, scaled so that they go with the rows of `W_dec` as they are."""
        if widths[-1] < self.config.num_latents:
            pairs = pairs.keep(pairs.cols < widths[-1])
        if self.config.scale_by_decoder_norm:
            pairs = pairs.with_values(pairs.values / row_norms(W_dec)[pairs.cols])
        return pairs

    # The whole

    def forward(
        self,
        hidden_states: Tensor,
        width: int | None = None,
        return_dict: bool | None = None,
        return_loss: bool = True,
    ) -> SAEOutput | tuple:
        """Encode, decode every prefix up to `width`, and measure the reconstruction.

        Args:
            hidden_states (`Tensor` of shape `(..., D)`): Raw hidden states.
            width (`int`, *optional*): Use only the first `width` latents (restricted).
            return_dict (`bool`, *optional*, defaults to `True`): `False` gives a tuple.
            return_loss (`bool`, *optional*, defaults to `True`):
                `False` leaves out the loss and the reconstructions of inner prefixes, which only it needs. By this
                name and default transformers' `Trainer` knows that a loss needs no labels.

        Returns:
            [`SAEOutput`]. The penalties of training are added by the trainer, which alone knows their schedules.
        """
        config = self.config
        fields = config.truncated(self._checked_width(width))
        widths = fields.get("prefix_widths", [fields["num_latents"]])
        weights = fields.get("prefix_weights", getattr(config, "prefix_weights", None))
        weights = weights or [1 / len(widths)] * len(widths)
        flat = self._flattened(hidden_states)
        pairs = self.encode_pairs(flat, width)
        loss = sse = None
        if return_loss and torch.is_grad_enabled() and pairs.input_norm is None:  # P prefixes cost little over one
            sse, residual = self.prefix_errors(pairs, flat, widths)
            reconstruction = flat - residual
        else:
            prefixes = self.decode_pairs(pairs, widths if return_loss else widths[-1:])
            reconstruction = prefixes[-1]
            if return_loss:
                sse = (prefixes - flat.to(at_least_float32(flat.dtype))).square().sum(-1).mean(-1)
        if sse is not None:
            loss = (sse * sse.new_tensor(weights)).sum()
        output = SAEOutput(
            loss=loss,
            reconstruction=reconstruction.view(*hidden_states.shape[:-1], config.d_in),
            latents=_slots(pairs, hidden_states.shape[:-1]),
            losses={"sse": sse} if return_loss else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _checked_width(self, width: int | None) -> int:
        if width is None:
            return self.config.num_latents
        check_width(width, self.config.num_latents)
        return width

    def _flattened(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[-1] != self.config.d_in:
            raise ValueError(
                f"This SAE takes hidden states of width d_in = {self.config.d_in}, got {tuple(hidden_states.shape)}. "
                f"It was trained on {self.config.base_model or 'an unnamed model'} at "
                f"{self.config.hookpoint or 'an unnamed hookpoint'}."
            )
        return hidden_states.reshape(-1, self.config.d_in).to(self.W_enc.dtype)

    # Files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, width: int | None = None, **kwargs: Any
    ) -> Self:
        """Load an SAE from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or repository id; also of a run or repository that holds one SAE in its folders.
            width (`int`, *optional*): Load only the first `width` latents; the others are neither read nor, from
                the Hub, downloaded. A later, larger width fetches only what is missing.
            subfolder (`str`, *optional*), revision (`str`, *optional*), dtype (`torch.dtype`, *optional*), ...:
                As for any transformers model.

        Raises:
            `ValueError`: if a file is damaged, lacks a tensor, holds other shapes or types than the config says, or
                numbers that are not finite; if there is no SAE in `subfolder`, or there are several and none is named.
            `OSError`: if the files are not there or cannot be fetched.
        """
        source = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        refuse_quantization(kwargs.get("quantization_config"))
        with failures_named(source, kwargs):
            if source is not None and kwargs.get("config") is None:
                kwargs |= place_of_sae(source, kwargs)
            if source is not None and (width is not None or in_pieces(source, kwargs)):
                config, state = read_prefix(cls.config_class, source, width, kwargs)
                kwargs |= {"config": config, "state_dict": state}
                pretrained_model_name_or_path = None
            else:
                complete_partial_files(source, kwargs)
                check_whole(cls.config_class, source, kwargs)
            # Mismatches are reported below: transformers raises a RuntimeError that names no tensor.
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        broken = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info[key]}
        if broken:
            forget_partial_files(source, kwargs)
            raise ValueError(f"The weights of {source} do not fit its config: {broken}. Save or download it again.")
        if source is not None:
            check_numbers(model.state_dict(), model.config, source)
        return (model, info) if wants_info else model


def _slots(pairs: LatentPairs, leading: torch.Size) -> SparseLatents:
    """The latents that fire, as slots of shape `(*leading, K)`."""
    slots = pairs.keep(pairs.values != 0).to_slots()
    norm = slots.input_norm
    if norm is not None:
        norm = (norm[0].view(*leading, 1), norm[1].view(*leading, 1))
    # No -1: it cannot be inferred where no token, or no latent, takes part.
    shape = (*leading, slots.values.shape[-1])
    return SparseLatents(slots.values.view(shape), slots.indices.view(shape), slots.num_latents, norm)


class ReluSAE(SAEModel):
    """A ReLU SAE (Bricken et al. 2023; decoder-norm-weighted L1 after Anthropic's April 2024 update)."""

    config_class = ReluSAEConfig


class TopKSAE(SAEModel):
    """A TopK SAE (Gao et al. 2024, arXiv 2406.04093)."""

    config_class = TopKSAEConfig


class BatchTopKSAE(SAEModel):
    """A BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410)."""

    config_class = BatchTopKSAEConfig


class JumpReLUSAE(SAEModel):
    """A JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    config_class = JumpReLUSAEConfig


class GatedSAE(SAEModel):
    """A Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    config_class = GatedSAEConfig


class MatryoshkaSAE(SAEModel):
    """A Matryoshka SAE over any of relu, topk, batch_topk and jumprelu (Bussmann et al. 2025, arXiv 2503.17547)."""

    config_class = MatryoshkaSAEConfig


MODELS = {
    model.config_class: model for model in (ReluSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE, GatedSAE, MatryoshkaSAE)
}
"""The model class of each config class."""

__all__ = ["SAEModel", *(model.__name__ for model in MODELS.values())]
