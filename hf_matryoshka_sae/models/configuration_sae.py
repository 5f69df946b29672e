"""Configurations of the six SAE families.

This file is copied to the Hub beside the weights, so it imports torch, transformers, huggingface_hub and the standard
library only. It must not use `from __future__ import annotations`: `@strict` then checks no types.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_checks import CheckedConfig


FORMAT_VERSION = 1
"""Raised whenever a checkpoint's tensors or fields change their meaning."""

DEFAULT_PREFIX_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Group sizes as shares of the dictionary (Bussmann et al. 2025, arXiv 2503.17547, section 4)."""

PREFIX_ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu")

INPUT_NORMALIZATIONS = ("layer_norm", "constant_norm")

# What transformers itself may write into, or pass to, any config.
_TRANSFORMERS_KEYS = {
    "torch_dtype",
    "name_or_path",
    "num_labels",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "tie_word_embeddings",
    "auto_map",
    "model_type",
    "transformers_weights",
    "distributed_config",
    "fusion_config",
    "per_layer_config",
    "use_cache",
}


def default_prefix_widths(num_latents: int) -> list[int]:
    """Nested widths whose groups have the default fractions of the dictionary.

    Args:
        num_latents (`int`): Size F of the dictionary.

    Returns:
        `list[int]`: Strictly increasing widths that end at `num_latents`.
    """
    total, widths = 0.0, []
    for fraction in DEFAULT_PREFIX_FRACTIONS:
        total += fraction
        widths.append(max(1, round(total * num_latents)))
    widths[-1] = num_latents
    return sorted({width for width in widths if width <= num_latents})


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or the list of what is known where nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def check_width(width: Any, num_latents: int) -> None:
    """Raises `ValueError` for what is no number of a dictionary's first latents."""
    if isinstance(width, bool) or not isinstance(width, Integral) or not 1 <= width <= num_latents:
        raise ValueError(f"`width` must lie between 1 and num_latents ({num_latents}), got {width!r}.")


@strict
class SAEConfig(CheckedConfig, PreTrainedConfig):
    """What every family shares.

    Args:
        d_in (`int`): Width D of the hidden states.
        num_latents (`int`): Number F of latents.
        apply_b_dec_to_input (`bool`, *optional*, defaults to `True`):
            Whether `b_dec` is subtracted from the input before the encoder.
        scale_by_decoder_norm (`bool`, *optional*, defaults to `False`):
            Whether latents are measured, and selected, in units of their contribution `a * ||d||` while the decoder's
            rows are free. `SAEModel.fold_decoder_norm_` turns such a model into an equal one with unit rows.
        base_model (`str`, *optional*): The language model whose hidden states it was trained on.
        hookpoint (`str`, *optional*): The module of that model, with `:input` where its input is meant.
        output_hookpoint (`str`, *optional*):
            In a transcoder, whose decoder gives the output of another place than it reads: that place.
        input_normalization (`str`, *optional*):
            What is done to each token's hidden state before the encoder, and undone after the decoder. `"layer_norm"`:
            its mean is taken off, and it is divided by its (unbiased) standard deviation + 1e-5 (Gao et al. 2024,
            arXiv 2406.04093). `"constant_norm"`: it gets the length sqrt(D). SAEs trained here have `None`: their
            normalisation is one for all tokens, and in the weights.
        screening (`bool`, *optional*, defaults to `True`):
            Whether bf16 products may say which latents can fire, where the hardware makes them fast; the latents that
            do fire, and their values, are those of float32 dot products (models/screening.py).
        refine_steps (`int`, *optional*, defaults to 0):
            How often the encoder looks again at what its code leaves out (models/refinement.py). Each step costs about
            as much as encoding and decoding; [`progressive.refined`] sets thresholds to go with it.
        refine_step_size (`float`, *optional*, defaults to 0.2): How far a step goes towards that; far ones overshoot.
        format_version (`int`, *optional*): Version of the checkpoint's format.

    Raises:
        `ValueError`: for an unknown field, a size below 1, or a checkpoint of a newer format.
    """

    model_type = "sae"
    activation_name = "relu"
    # `Trainer.predict` gives the reconstruction alone: sparse latents of different batches have different shapes.
    keys_to_ignore_at_inference = ["latents", "losses"]

    d_in: int = 768
    num_latents: int = 16384
    apply_b_dec_to_input: bool = True
    scale_by_decoder_norm: bool = False
    base_model: str | None = None
    hookpoint: str | None = None
    output_hookpoint: str | None = None
    input_normalization: str | None = None
    screening: bool = True
    refine_steps: int = 0
    refine_step_size: int | float = 0.2
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This SAE was written in format {self.format_version}; this version of hf_matryoshka_sae reads up to "
                f"{FORMAT_VERSION}. Update the package: pip install -U hf_matryoshka_sae."
            )
        known = {field.name for field in fields(self)}
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS and not key.startswith("_"):
                raise ValueError(f"Unknown field {key!r} for {type(self).__name__}.{nearest(key, known)}")
        super().__post_init__(**kwargs)
        # `@strict` runs this again, but wraps what it raises in a class that is no ValueError.
        self.validate_fields()

    def validate_fields(self) -> None:
        """Check what types alone do not say. Raises `ValueError`."""
        for name in ("d_in", "num_latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        kind = self.input_normalization
        if kind is not None and kind not in INPUT_NORMALIZATIONS:
            raise ValueError(f"Unknown `input_normalization` {kind!r}.{nearest(kind, INPUT_NORMALIZATIONS)}")
        if self.refine_steps < 0 or not 0 < self.refine_step_size <= 1:
            raise ValueError(
                "`refine_steps` must be at least 0 and `refine_step_size` lie in (0, 1], got "
                f"{self.refine_steps} and {self.refine_step_size}."
            )
        if self.refine_steps and self.scale_by_decoder_norm:
            raise ValueError("`refine_steps` needs latents in their own units: `fold_decoder_norm_()` the SAE first.")

    @property
    def widths(self) -> list[int]:
        """Prefix widths; a plain SAE has one, the whole dictionary."""
        return [self.num_latents]

    def truncated(self, width: int) -> dict:
        """The fields of the config that describes the first `width` latents."""
        check_width(width, self.num_latents)
        changed = {"num_latents": width}
        if isinstance(getattr(self, "k", None), int | float) and self.k > width:
            changed["k"] = width  # restricted to fewer latents than k, all of them may fire
        return changed


def _validate_k(config: "SAEConfig", whole: bool) -> None:
    k = config.k
    if not (math.isfinite(k) and 0 < k <= config.num_latents):
        raise ValueError(f"`k` must lie between 1 and num_latents ({config.num_latents}), got {k}.")
    if whole and k != int(k):
        raise ValueError(f"`k` must be a whole number where each token keeps k latents, got {k}.")


def _validate_thresholds(config: "SAEConfig") -> None:
    if not (math.isfinite(config.bandwidth) and config.bandwidth > 0):
        raise ValueError(f"`bandwidth` must be above 0, got {config.bandwidth}.")
    if not (math.isfinite(config.initial_threshold) and config.initial_threshold >= 0):
        raise ValueError(f"`initial_threshold` must be at least 0, got {config.initial_threshold}.")


@strict
class ReluSAEConfig(SAEConfig):
    """A ReLU SAE: `a = relu(W_enc (x - b_dec) + b_enc)` (methods: Bricken et al. 2023)."""

    model_type = "relu_sae"
    activation_name = "relu"


@strict
class TopKSAEConfig(SAEConfig):
    """A TopK SAE (Gao et al. 2024, arXiv 2406.04093, eq. 3).

    Args:
        k (`int`, *optional*, defaults to 32): Latents kept per token, a whole number; those below zero become zero.
        group_size (`int`, *optional*):
            Keep the largest of each group of so many latents instead ("groupmax"); k is how many groups there are. A
            latent belongs to the group of its original id, also after sorting or pruning.
    """

    model_type = "topk_sae"
    activation_name = "topk"

    k: int | float = 32
    group_size: int | None = None

    def validate_fields(self) -> None:
        """Check what types alone do not say. Raises `ValueError`."""
        super().validate_fields()
        _validate_k(self, whole=True)
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"`group_size` must be at least 1, got {self.group_size}.")


@strict
class BatchTopKSAEConfig(SAEConfig):
    """A BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410).

    Args:
        k (`int` or `float`, *optional*, defaults to 32):
            Latents kept per token on average over a training batch. At inference a latent fires above `threshold`.
    """

    model_type = "batch_topk_sae"
    activation_name = "batch_topk"

    k: int | float = 32

    def validate_fields(self) -> None:
        """Check what types alone do not say. Raises `ValueError`."""
        super().validate_fields()
        _validate_k(self, whole=False)


@strict
class JumpReLUSAEConfig(SAEConfig):
    """A JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435).

    Args:
        bandwidth (`float`, *optional*, defaults to 0.05):
            Width of the rectangle kernel of the straight-through gradient, in units of pre-activations.
        initial_threshold (`float`, *optional*, defaults to 0.01): Where every threshold starts.
    """

    model_type = "jumprelu_sae"
    activation_name = "jumprelu"

    bandwidth: int | float = 0.05
    initial_threshold: int | float = 0.01

    def validate_fields(self) -> None:
        """Check what types alone do not say. Raises `ValueError`."""
        super().validate_fields()
        _validate_thresholds(self)


@strict
class GatedSAEConfig(SAEConfig):
    """A Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014). `b_enc` is the gate's bias."""

    model_type = "gated_sae"
    activation_name = "gated"


@strict
class MatryoshkaSAEConfig(SAEConfig):
    """A Matryoshka SAE: every prefix of its latents is an SAE (Bussmann et al. 2025, arXiv 2503.17547).

    Args:
        activation (`str`, *optional*, defaults to `"batch_topk"`): `"relu"`, `"topk"`, `"batch_topk"` or `"jumprelu"`.
        prefix_widths (`list[int]`, *optional*):
            Strictly increasing widths that end at `num_latents`; by default groups of 1/32, 1/16, 1/8, 1/4 and 17/32.
        prefix_weights (`list[float]`, *optional*):
            Weight of each prefix's reconstruction loss; by default 1/P each.
        k (`int` or `float`, *optional*, defaults to 32): As in the TopK and BatchTopK families.
        bandwidth (`float`, *optional*), initial_threshold (`float`, *optional*): As in the JumpReLU family.
    """

    model_type = "matryoshka_sae"

    activation: str = "batch_topk"
    prefix_widths: list[int] | tuple[int, ...] | None = None
    prefix_weights: list[int | float] | tuple[int | float, ...] | None = None
    k: int | float = 32
    bandwidth: int | float = 0.05
    initial_threshold: int | float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if self.prefix_widths is None:
            self.prefix_widths = default_prefix_widths(self.num_latents)
        self.prefix_widths = list(self.prefix_widths)
        super().__post_init__(**kwargs)

    def validate_fields(self) -> None:
        """Check what types alone do not say. Raises `ValueError`."""
        super().validate_fields()
        if self.activation not in PREFIX_ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}.{nearest(self.activation, PREFIX_ACTIVATIONS)}")
        if self.activation in ("topk", "batch_topk"):
            _validate_k(self, whole=self.activation == "topk")
        _validate_thresholds(self)
        self._validate_prefixes()

    def _validate_prefixes(self) -> None:
        widths, weights = list(self.prefix_widths), self.prefix_weights
        increasing = all(a < b for a, b in zip([0, *widths], widths, strict=False))
        if not widths or not increasing or widths[-1] != self.num_latents:
            raise ValueError(
                f"`prefix_widths` must be positive, strictly increase and end at num_latents ({self.num_latents}), "
                f"got {repr(widths)[:200]}."
            )
        if weights is not None and not (
            len(weights) == len(widths) and all(0 <= weight < math.inf for weight in weights) and any(weights)
        ):
            raise ValueError(
                f"`prefix_weights` needs one weight of at least 0 for each of the {len(widths)} prefixes, not all 0; "
                f"got {list(weights)}."
            )

    @property
    def activation_name(self) -> str:
        """Which activation the prefixes share."""
        return self.activation

    @property
    def widths(self) -> list[int]:
        """Prefix widths, smallest first."""
        return list(self.prefix_widths)

    def truncated(self, width: int) -> dict:
        """The fields of the config that describes the first `width` latents."""
        changed = super().truncated(width)
        inner = [i for i, w in enumerate(self.prefix_widths) if w < width]
        changed["prefix_widths"] = [self.prefix_widths[i] for i in inner] + [width]
        if self.prefix_weights is not None:
            # The cut prefix takes the weight of the first prefix that holds it.
            weights = [self.prefix_weights[i] for i in [*inner, len(inner)]]
            changed["prefix_weights"] = weights if any(weights) else None
        return changed


CONFIGS = {
    config.model_type.removesuffix("_sae"): config
    for config in (
        ReluSAEConfig,
        TopKSAEConfig,
        BatchTopKSAEConfig,
        JumpReLUSAEConfig,
        GatedSAEConfig,
        MatryoshkaSAEConfig,
    )
}
"""The families by the name a run's YAML gives them (`type:`)."""

__all__ = [config.__name__ for config in (SAEConfig, *CONFIGS.values())]
