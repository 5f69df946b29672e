"""One dictionary of a run: an entry of `saes`."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ...common.command import nearest
from .fields import from_dict
from .presets import PRESETS, defaults_for, set_by_preset, widths_from_fractions


if TYPE_CHECKING:
    from ...models import SAEConfig


FAMILIES = ("relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka")
"""What `type` of an entry of `saes` can be: the models' families, named here so that fields are read before torch."""


LEVEL_WEIGHTS = ("mean", "sum", "mean_squared", "balance", "inner", "whole")
"""Schemes by which prefixes are weighed, see [`SAESpec`]."""


_RATES = ("encoder_lr_scale", "encoder_bias_lr_scale", "decoder_bias_lr_scale", "threshold_lr_scale")
_NOT_NEGATIVE = (*_RATES, "lr_steps", "betas_steps", "level_weights_steps")


@dataclass
class SAESpec:
    """One dictionary of a run (an entry of `saes:`); it is trained at each of the run's hookpoints.

    A field left out takes the value of `preset`, if one is named, or else the default of its family.
    """

    # What it is
    type: str = "matryoshka"
    """`relu`, `topk`, `batch_topk`, `jumprelu`, `gated` or `matryoshka`."""
    name: str | None = None
    """Folder of the results; made from family, size and k where it is left out."""
    preset: str | None = None
    """A published objective: `paper`, `dictionary_learning`, `saebench`, `saelens`, `bussmann`, `nabeshima`,
    `balance`."""
    hookpoints: list[str] | None = None
    """Train this one only at these of the run's hookpoints (paths or globs)."""
    init_from: str | None = None
    """Folder or repository of a trained SAE to continue from; a run's folder works too."""
    grow_from: str | None = None
    """The same of an SAE whose latents become the first ones of this dictionary of `num_latents`; for `type:
    matryoshka` with the SAE's `activation`. What is left out of `k` and `prefix_widths` is the SAE's."""
    freeze_base: bool = True
    """With `grow_from`: its latents and `b_dec` stay bit for bit the same, only new latents are trained. BatchTopK
    then needs a larger `k`, ReLU and JumpReLU a `target_l0` above the L0 it has."""

    # The dictionary
    num_latents: int | None = None
    """Size F of the dictionary; by default 16 times the width of the hidden states."""
    k: int | float | None = None
    """TopK: latents kept for each token. BatchTopK: for each token on average. By default 32."""
    activation: Literal["relu", "topk", "batch_topk", "jumprelu"] | None = None
    """Matryoshka: which activation all prefixes share; by default `batch_topk`."""
    prefix_widths: list[int] | None = None
    """Matryoshka: widths that are trained to be SAEs, increasing to `num_latents`; by default groups of 1/32, 1/16,
    1/8, 1/4 and 17/32."""
    prefix_fractions: list[float] | None = None
    """Group sizes as shares of the dictionary; used where `prefix_widths` is not given."""
    apply_b_dec_to_input: bool | None = None
    """Subtract `b_dec` from the input before the encoder; by default yes."""
    scale_by_decoder_norm: bool | None = None
    """Measure and select latents by their contribution, value times norm of the decoder row; by default no."""
    bandwidth: float | None = None
    """JumpReLU: width of the straight-through gradient's kernel, in units of pre-activations; by default half of the
    first threshold, with `start_at_target`, or else 0.05."""
    initial_threshold: float | None = None
    """JumpReLU: where every threshold starts; by default where `start_at_target` says, or else at 0.01."""

    # The objective
    level_weights: str | list[float] = "mean"
    """`mean` (1/P each), `sum` (1 each), `mean_squared` (1/P^2 each), `balance` (see `balance`), `inner` (the whole
    dictionary weighs 0.32, inner prefix i in proportion to i^-0.4), `whole` (it weighs 0.65, inner prefixes the
    same), or a list. With the last two the last inner prefix weighs half of what it would."""
    level_weights_end: str | list[float] | None = None
    """Move from `level_weights` to these, linearly over the run. Where neither is given, `type: matryoshka` moves from
    `inner` to `whole`."""
    level_weights_steps: int = 0
    """Move over at least so many steps: a shorter run ends on the way, nearer to `level_weights`."""
    balance: float = 1.0
    """With `level_weights: balance`, prefix i of P weighs balance^(P-i); divided by P where balance > 1."""
    bias_level: bool = False
    """Add `b_dec` alone as the smallest prefix."""
    error_unit: Literal["sum", "mean", "fvu"] = "sum"
    """Squared error summed over D, averaged over D, or divided by the batch's variance."""
    random_prefixes: int = 0
    """Draw this many prefixes anew each step, the whole dictionary among them (0: the fixed `prefix_widths`)."""
    prefix_power: float = 0.5
    """With `random_prefixes`: width w is drawn with a probability proportional to (w/F)^power - ((w-1)/F)^power; 0.5
    draws small ones most."""
    min_prefix: int = 1
    """With `random_prefixes`: the least width that is drawn."""
    sparsity_coefficient: float | None = None
    """ReLU, JumpReLU and Gated: weight of the sparsity penalty; where it follows `target_l0`, where it begins."""
    sparsity_warmup_steps: int | None = None
    """Steps over which the coefficient grows to its value; by default a fifth of the run, or none with
    `start_at_target`."""
    sparsity_penalty: Literal["l1", "log"] = "l1"
    """ReLU and Gated: of a latent's value times the norm of its decoder row, the sum (`l1`), or of log(1 + 10 x that)
    (`log`)."""
    target_l0: float | None = None
    """ReLU and Gated: the coefficient follows this L0. JumpReLU: the penalty is (L0 / target - 1)^2. At the end all
    thresholds (`-b_enc` of ReLU and Gated) move by one amount, solved for on `calibration_tokens`, that meets it."""
    start_at_target: bool = False
    """ReLU, JumpReLU and Gated: begin with the threshold (`-b_enc` of ReLU and Gated) at which `target_l0` latents
    fire on the first hidden states. By default new SAEs do."""
    controller_rate: float = 0.03
    """ReLU and Gated: change of the coefficient's logarithm in a step, for each unit of log(L0 / target)."""
    nested_penalty: float = 1.0
    """Matryoshka over ReLU: share of the penalty that a latent pays in every prefix that holds it, by the prefix's
    weight; the rest is the same for all latents."""
    multi_topk: bool = False
    """TopK: add the loss at 4k latents, weighted 1/8."""
    auxk_coefficient: float = 1 / 32
    """Weight of the loss by which dead latents learn what the others leave (AuxK); 0: none."""
    auxk_k: int | None = None
    """Dead latents that fit a token's residual; half of d_in by default."""
    auxk_normalize: bool = True
    """Divide that loss by the variance of what is left."""
    auxk_detach_residual: bool = True
    """Keep its gradient from the latents that are alive."""
    auxk_rectify: bool = True
    """Count only positive values of the dead latents."""
    auxk_scale_by_dead: bool = False
    """Weigh it less where fewer than `auxk_k` latents are dead."""
    dead_tokens: int | None = None
    """A latent that has not fired on this many tokens is dead; by default 1/150 of the run, at most 10 million."""

    # The optimisation
    lr: float | None = None
    """Highest learning rate; by default `lr_base / sqrt(num_latents / 16384)`."""
    lr_base: float | None = None
    """Learning rate of a dictionary of 16,384 latents; by default `0.113 / sqrt(d_in)`, and no `lr` above `0.25 /
    sqrt(d_in)`: a step turns a unit row by the same angle whatever its width."""
    lr_steps: int = 0
    """Steps of a run for which the default rate is meant: a shorter one gets it times root(`lr_steps` / steps), at
    most twice (0: all runs are alike)."""
    encoder_lr_scale: float = 1.0
    """Learning rate of `W_enc`, and of Gated's `r_mag`, relative to the others'."""
    encoder_bias_lr_scale: float = 1.0
    """Learning rate of `b_enc`, and of Gated's `b_mag`, relative to the others'."""
    decoder_bias_lr_scale: float = 1.0
    """Learning rate of `b_dec` relative to the others'."""
    threshold_lr_scale: float = 1.0
    """JumpReLU: learning rate of the thresholds relative to the others'."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of Adam's two moments per step."""
    betas_steps: int = 0
    """Steps of a run for which `betas` are meant: in a shorter one the second moment forgets `betas_steps` / steps
    times as fast, at most five times (0: all runs are alike)."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    optimizer_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """What Adam's moments are kept in: 8, 4 or 2 bytes for each weight."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """What `W_enc` and `W_dec`, and so their gradients, are kept in, in training and in the saved file."""
    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; by default a twentieth of the run, or more where `lr_steps` raises the rate, at most
    1,000. Never more than half of the run."""
    lr_decay_fraction: float = 1.0
    """Share of the steps at the end over which the rate falls to `lr_end`."""
    lr_end: float = 0.0
    """Learning rate at the end, as a share of its peak."""
    grad_clip: float | None = None
    """Largest norm of the gradient; by default it is not clipped, but 0.2 for `gated` and `relu`."""
    k_start: float | None = None
    """BatchTopK and TopK: begin with this k."""
    k_anneal_steps: int | None = None
    """Reach `k` after so many steps; a tenth of the run by default."""
    dead_threshold_decay: float = 0.0
    """JumpReLU: share of its threshold that a dead latent loses at each step, until it fires again."""
    topk_fraction: float = 0.0
    """BatchTopK, and JumpReLU with a `target_l0`: share of the steps, from the first on, in which each token keeps its
    own `k` or `target_l0` largest, as in TopK."""
    ema_decay: float | None = None
    """Save an average of the weights that decays by this factor each step; by default the weights themselves."""
    unit_norm_decoder: bool = True
    """Keep the decoder's rows at length 1."""
    train_b_enc: bool = True
    """Whether `b_enc` is trained, or stays 0."""
    sort_every: int = 0
    """Put latents in order of their energy every so many steps (0: never). By default `type: matryoshka` does so every
    50, unless it goes on from a trained SAE."""
    latent_shards: int | None = None
    """The same for this one alone."""
    processes: list[int] | None = None
    """Train this one only on these processes of the run (ranks); by default on all that hold SAEs."""
    device: str | None = None
    """Train this one on another device of its process, for example `cuda:1`."""
    input_scaling: Literal["center", "rms", "norm", "none"] = "center"
    """`center`, `rms`: (x - mean) / c, x / c with E||x||^2 = 1, so that centred squared errors are FVUs; `norm`: x / c
    with mean ||x|| = sqrt(d); `none`: raw x."""
    encoder_init: Literal["decoder", "normal"] = "decoder"
    """Where the encoder begins: at the decoder's rows, or at the same directions drawn with length about 1 (normal
    numbers / sqrt(d_in))."""
    encoder_init_scale: float = 1.0
    """Factor on the encoder's rows at the start."""
    decoder_init_norm: float = 1.0
    """Length of the decoder's rows at the start."""
    b_dec_init: Literal["mean", "geometric_median", "zero"] = "mean"
    """Where `b_dec` begins, of the normalised hidden states."""

    def __post_init__(self) -> None:
        if self.type not in FAMILIES:
            raise ValueError(f"Unknown SAE family `type: {self.type}`.{nearest(self.type, FAMILIES)}")
        for name in ("level_weights", "level_weights_end"):
            scheme = getattr(self, name)
            if isinstance(scheme, str) and scheme not in LEVEL_WEIGHTS:
                raise ValueError(
                    f"`{name}` must be a list of numbers or one of {', '.join(LEVEL_WEIGHTS)}; got {scheme!r}."
                    f"{nearest(scheme, LEVEL_WEIGHTS)}"
                )
        self._check_numbers()
        if None not in (self.k, self.num_latents) and not 0 < self.k <= self.num_latents:
            raise ValueError(f"`k` must lie between 1 and num_latents ({self.num_latents}), got {self.k}.")
        if self.random_prefixes and self.type != "matryoshka":
            raise ValueError("`random_prefixes` needs `type: matryoshka`.")
        if self.grow_from is not None:
            self._check_growth()

    def _check_numbers(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")
        for name in ("nested_penalty", "lr_decay_fraction", "topk_fraction", "dead_threshold_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")

    def _check_growth(self) -> None:
        if self.init_from is not None:
            raise ValueError(
                "`grow_from` and `init_from` exclude each other: a base grows, or is gone on with as it is."
            )
        if self.type != "matryoshka":
            raise ValueError(f"`grow_from` makes an SAE of `type: matryoshka`, got {self.type}.")
        if self.num_latents is None:
            raise ValueError("`grow_from` needs `num_latents`, the size of the larger dictionary.")
        for name in ("random_prefixes", "sort_every"):
            if self.freeze_base and getattr(self, name):
                raise ValueError(f"`{name}` would move a frozen base. Set `{name}: 0`, or `freeze_base: false`.")
        if self.freeze_base and self.topk_fraction:
            raise ValueError("With `topk_fraction` a frozen base would not fire as it does. Set `freeze_base: false`.")
        if self.freeze_base and self.weights_dtype != "float32":
            raise ValueError(
                f"`weights_dtype: {self.weights_dtype}` would round a frozen base. Leave it out, or set `freeze_base: "
                "false`."
            )

    @property
    def starts_at_target(self) -> bool:
        """Whether a new SAE begins with as many latents firing as `target_l0` asks for."""
        return self.start_at_target and self.target_l0 is not None

    @property
    def solves_thresholds(self) -> bool:
        """Whether thresholds are solved for when a run ends: BatchTopK's, and those that are to meet `target_l0`."""
        activation = self.activation or "batch_topk" if self.type == "matryoshka" else self.type
        return activation == "batch_topk" or (activation != "topk" and self.target_l0 is not None)

    @classmethod
    def from_dict(cls, data: dict, where: str) -> "SAESpec":
        """A spec with the preset's, then the family's, values where `data` gives none."""
        if not isinstance(data, dict):
            raise ValueError(f"`{where.rstrip('.')}` must hold fields such as {{type: matryoshka}}, got {data!r}.")
        preset = data.get("preset")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"Unknown `{where}preset: {preset}`.{nearest(str(preset), PRESETS)}")
        filled = {**PRESETS.get(preset, {}), **data}
        defaults = defaults_for(filled) if preset is None else {}
        return from_dict(cls, {**defaults, **filled}, where)

    def sae_config(self, d_in: int, base_model: str, hookpoint: str, like: "SAEConfig | None" = None) -> "SAEConfig":
        """The model's config at a hookpoint of width `d_in`; fields that are not given are those of `like`.

        Raises:
            `ValueError`: if a field does not belong to the family, or its value does not fit.
        """
        from ...models import CONFIGS

        cls = CONFIGS[self.type]
        given = {name: getattr(self, name) for name in _MODEL_FIELDS if getattr(self, name) is not None}
        if like is not None:
            given = {name: getattr(like, name) for name in _MODEL_FIELDS if hasattr(like, name)} | given
            if given["num_latents"] != like.num_latents:
                raise ValueError(
                    f"`num_latents` is {given['num_latents']}, the SAE to go on from has {like.num_latents}."
                )
        given.setdefault("num_latents", 16 * d_in)
        if self.prefix_fractions is not None and self.prefix_widths is None:
            given["prefix_widths"] = widths_from_fractions(self.prefix_fractions, given["num_latents"])
        known = {entry.name for entry in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                hint = set_by_preset(name, self.preset) or (" Use `target_l0`." if name == "k" else "")
                raise ValueError(f"`{name}` is no field of an SAE of `type: {self.type}`.{hint}")
        if isinstance(given.get("k"), float) and given["k"] == int(given["k"]):
            given["k"] = int(given["k"])
        return cls(d_in=d_in, base_model=base_model, hookpoint=hookpoint, **given)

    def folder(self, config: "SAEConfig") -> str:
        """Name of the folder of the results."""
        if self.name:
            return self.name
        kind = f"{self.type}-{config.activation_name}" if self.type == "matryoshka" else self.type
        competing = config.activation_name in ("topk", "batch_topk")
        sparsity = f"-k{config.k:g}" if competing else f"-l0_{self.target_l0:g}" if self.target_l0 else ""
        return f"{kind}-{config.num_latents}{sparsity}" + (f"-{self.preset}" if self.preset else "")


_MODEL_FIELDS = ("num_latents", "k", "activation", "prefix_widths", "apply_b_dec_to_input", "scale_by_decoder_norm")


_MODEL_FIELDS += ("bandwidth", "initial_threshold")
