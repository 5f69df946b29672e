"""Published objectives by name, and what each family takes where a run says nothing.

A preset reproduces the objective of a paper or library: its level weights, units, auxiliary loss, normalisation,
initialisation and optimiser. Fields that a run gives itself win over the preset's.
"""

from typing import Any


_FIVE_GROUPS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]

PRESETS: dict[str, dict[str, Any]] = {
    # Bussmann et al. 2025, arXiv 2503.17547, section 3: the sum over levels, AuxK after Gao et al.
    "paper": dict(
        dead_tokens=10_000_000,
        grad_clip=1.0,
        type="matryoshka",
        activation="batch_topk",
        prefix_fractions=_FIVE_GROUPS,
        level_weights="sum",
        auxk_k=512,
        lr=3e-4,
        lr_warmup_steps=1000,
        lr_decay_fraction=0.2,
        input_scaling="rms",
    ),
    # saprmarks/dictionary_learning, matryoshka_batch_top_k.py: weights 1/P, then the mean over levels.
    "dictionary_learning": dict(
        dead_tokens=10_000_000,
        grad_clip=1.0,
        type="matryoshka",
        activation="batch_topk",
        prefix_fractions=_FIVE_GROUPS,
        level_weights="mean_squared",
        lr_base=2e-4,
        lr_warmup_steps=1000,
        lr_decay_fraction=0.0,
        input_scaling="none",
        b_dec_init="geometric_median",
    ),
    # SAEBench's suite, the same trainer with its own optimiser settings.
    "saebench": dict(
        dead_tokens=10_000_000,
        grad_clip=1.0,
        type="matryoshka",
        activation="batch_topk",
        prefix_fractions=_FIVE_GROUPS,
        level_weights="mean_squared",
        lr=3e-4,
        lr_warmup_steps=1000,
        lr_decay_fraction=0.2,
        input_scaling="rms",
        b_dec_init="geometric_median",
    ),
    # SAELens 6.54, matryoshka_batchtopk: the sum over levels, selection by contribution, AuxK not normalised.
    "saelens": dict(
        grad_clip=1.0,
        type="matryoshka",
        activation="batch_topk",
        prefix_fractions=_FIVE_GROUPS,
        level_weights="sum",
        scale_by_decoder_norm=True,
        unit_norm_decoder=False,
        decoder_init_norm=0.1,
        auxk_coefficient=1.0,
        auxk_normalize=False,
        auxk_rectify=False,
        auxk_scale_by_dead=True,
        dead_tokens=1000 * 4096,
        lr=3e-4,
        lr_warmup_steps=0,
        lr_decay_fraction=0.0,
        input_scaling="none",
        b_dec_init="zero",
    ),
    # bartbussmann/matryoshka_sae: the mean over P + 1 levels, b_dec alone among them, and over D; b_enc unused; AuxK
    # lets its gradient into the residual.
    "bussmann": dict(
        type="matryoshka",
        activation="batch_topk",
        prefix_fractions=[1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2],
        level_weights="mean",
        bias_level=True,
        error_unit="mean",
        train_b_enc=False,
        auxk_k=512,
        auxk_normalize=False,
        auxk_detach_residual=False,
        dead_tokens=20 * 4096,
        lr=3e-4,
        betas=[0.9, 0.99],
        lr_warmup_steps=0,
        lr_decay_fraction=0.0,
        grad_clip=1e5,
        input_scaling="none",
        b_dec_init="zero",
    ),
    # noanabeshima/matryoshka-saes: prefixes drawn each step, decoder-norm-weighted L1, latents kept sorted.
    "nabeshima": dict(
        grad_clip=1.0,
        type="matryoshka",
        activation="relu",
        apply_b_dec_to_input=False,
        random_prefixes=10,
        prefix_power=0.5,
        level_weights="mean",
        sparsity_penalty="l1",
        sparsity_coefficient=1.2,
        target_l0=32.0,
        sort_every=1,
        auxk_coefficient=0.0,
        unit_norm_decoder=False,
        encoder_init="normal",
        decoder_init_norm=0.1,
        # Published: 3e-2, with which an eighth and more of the latents die in runs of some hundred steps. This is 1e-2
        # for 1,024 latents, which are the fewest that were tried; of 4,096 and 6,144 that kills 7 and 16%.
        lr_base=2.5e-3,
        betas=[0.5, 0.9375],
        lr_warmup_steps=100,
        lr_decay_fraction=0.2,
        lr_end=0.1,
        input_scaling="norm",
        b_dec_init="zero",
    ),
    # Chanin et al. 2025, arXiv 2505.11756: inner level i weighs balance^(P-i).
    "balance": dict(
        dead_tokens=10_000_000,
        type="matryoshka",
        activation="batch_topk",
        prefix_fractions=_FIVE_GROUPS,
        level_weights="balance",
        balance=0.75,
        lr=1e-4,
        lr_warmup_steps=0,
        lr_decay_fraction=0.0,
        input_scaling="none",
    ),
}

# What measures best for the families as this package trains them (benchmarks/quality.py). Short memories let Adam
# follow latents that fire rarely; an encoder that moves slower than its decoder keeps latents alive. All tokens pull
# at `b_dec`, and those with huge states most: at the others' rate it swings, and what fires swings with it.
# Found on runs of 1,464 steps; shorter ones need higher rates, shorter memories and weights that stay on inner
# prefixes.
_FEW_STEPS = 1400
_RATES = dict(encoder_lr_scale=0.5, encoder_bias_lr_scale=0.15, decoder_bias_lr_scale=0.03)
# Of memories as short as Matryoshka SAEs have in 195 steps, plain ones die.
_MEMORY = dict(betas=[0.7, 0.99], betas_steps=600)
# How long every token keeps places of its own where later a threshold decides: the longer, the fewer latents die; but
# inner prefixes gain by places of the batch.
_PLAIN_TOPK, _NESTED_TOPK = 0.7, 0.3
_SELECTED = dict(_RATES, lr_steps=_FEW_STEPS)
# The same rates for families whose latents pay for firing, from a start at which as many fire as should: whatever
# fires at random in the first steps is pulled down, and with long memories Adam goes on pulling until it is dead.
_PENALISED = dict(_RATES, target_l0=32.0, start_at_target=True)
# Where no latents compete, a batch with some huge states has a gradient ten times as long as others. Without clipping
# a quarter of a Gated dictionary fell silent within 25 steps (benchmarks/README.md).
_SPIKES = 0.2
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "topk": _SELECTED,
    "batch_topk": dict(_SELECTED, topk_fraction=_PLAIN_TOPK),
    # A latent that is below 0 on every token has no gradient but from what it would add were it not rectified.
    "relu": dict(_PENALISED, sparsity_penalty="log", auxk_rectify=False, grad_clip=_SPIKES),
    "jumprelu": dict(
        _PENALISED,
        lr_steps=_FEW_STEPS,
        topk_fraction=_PLAIN_TOPK,
        sparsity_coefficient=10.0,
        threshold_lr_scale=0.3,
        dead_threshold_decay=0.1,
    ),
    # AuxK would teach dead gates to fit the residual, but hardly any of them to fire.
    "gated": dict(_PENALISED, auxk_coefficient=0.0, grad_clip=_SPIKES),
}


def set_by_preset(name: str, preset: str | None) -> str:
    """A sentence that a field which does not fit comes from a preset; empty where none sets it."""
    fields = PRESETS.get(preset or "", {})
    # Widths are worked out from a preset's fractions.
    if name not in fields and not (name == "prefix_widths" and "prefix_fractions" in fields):
        return ""
    return f" It comes from `preset: {preset}`, which is for `type: {fields['type']}`: leave out one of the two."


def defaults_for(fields: dict[str, Any]) -> dict[str, Any]:
    """The default recipe for an entry of `saes` that names no preset.

    For Matryoshka SAEs the errors of inner prefixes count most at first and that of the whole dictionary at the end,
    and latents change places between prefixes by their energy: what fixed, equal weights cost the whole dictionary is
    halved, for prefixes as good (benchmarks/README.md).
    """
    family, new = fields.get("type", "matryoshka"), fields.get("init_from") is None and fields.get("grow_from") is None
    activation = fields.get("activation") or "batch_topk" if family == "matryoshka" else family
    defaults = dict(_FAMILY_DEFAULTS.get(activation, {}))
    if defaults and fields.get("betas") is None:
        defaults |= _MEMORY
    if not new:
        for start in ("start_at_target", "topk_fraction"):
            defaults.pop(start, None)
    if family != "matryoshka":
        return defaults
    if "topk_fraction" in defaults:
        defaults["topk_fraction"] = _NESTED_TOPK
    if "lr_steps" in defaults:  # of latents that compete, those of inner prefixes stand on it more
        defaults["decoder_bias_lr_scale"] = 0.1
    if "betas_steps" in defaults:
        defaults["betas_steps"] = _FEW_STEPS
    if fields.get("level_weights") is None and fields.get("level_weights_end") is None:
        defaults |= dict(level_weights="inner", level_weights_end="whole", level_weights_steps=_FEW_STEPS)
    if new:
        defaults["sort_every"] = 50
    return defaults


def widths_from_fractions(fractions: list[float], num_latents: int) -> list[int]:
    """Prefix widths whose groups have these shares of the dictionary, which must add up to 1."""
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) <= 0:
        raise ValueError(f"`prefix_fractions` must be positive and add up to 1, got {fractions}.")
    ends = [round(sum(fractions[: i + 1]) * num_latents) for i in range(len(fractions))]
    return [*ends[:-1], num_latents]
