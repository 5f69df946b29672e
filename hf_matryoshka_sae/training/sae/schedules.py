"""What changes from step to step: each a pure function of the step, so that a resumed run needs no memory of them."""

import math

import torch

from ...models import SAEConfig
from ..config.spec import SAESpec


# Beyond twice the rate latents die, however short the run (benchmarks/README.md).
_MOST_HASTE = 2.0
# A second moment that forgets faster still kills latents.
_MOST_FORGETFUL = 5.0


def learning_rate(spec: SAESpec, config: SAEConfig, step: int, steps: int) -> float:
    """Learning rate of a step counted from 0: linear warm-up to the peak, constant, linear decay to `lr_end`."""
    rate = min(1.0, (step + 1) / (warmup_steps(spec, steps) + 1))
    decay = spec.lr_decay_fraction * steps
    left = (steps - step) / decay if decay else math.inf
    return peak_rate(spec, config, steps) * rate * (spec.lr_end + (1 - spec.lr_end) * min(1.0, left))


def peak_rate(spec: SAESpec, config: SAEConfig, steps: int) -> float:
    """Highest learning rate of a run of so many steps.

    It is `lr`, or else `lr_base / sqrt(F / 16384)` (Gao et al. 2024, arXiv 2406.04093, section A.3). Adam moves each
    coordinate by about the rate, so a unit row of width D turns by about rate * sqrt(D): `lr_base` falls with it, and
    a small dictionary gets no rate that would turn rows by more than a quarter. Rows have to turn from random
    directions to where they belong in however few steps there are: a run shorter than `lr_steps` gets a higher rate.
    """
    growth = 1 / math.sqrt(config.num_latents / 16384)
    if spec.lr is not None:
        return spec.lr
    if spec.lr_base is not None:
        return spec.lr_base * growth
    return _haste(spec, steps) * min(0.113 * growth, 0.25) / math.sqrt(config.d_in)


def _haste(spec: SAESpec, steps: int) -> float:
    """How many times the rate of a long run one of so many steps gets, from 1 to 2; 1 where the spec says a rate."""
    if spec.lr is not None or spec.lr_base is not None:
        return 1.0
    return min(_MOST_HASTE, max(1.0, math.sqrt(spec.lr_steps / max(1, steps))))


def adam_betas(spec: SAESpec, steps: int) -> tuple[float, float]:
    """Decay of Adam's two moments in a run of so many steps.

    A batch with some huge states lengthens the second moment, and so shortens the steps of all latents, until it is
    forgotten: with 0.99 half of a run of 195 steps (benchmarks/README.md).
    """
    first, second = spec.betas
    return first, 1 - (1 - second) * min(_MOST_FORGETFUL, max(1.0, spec.betas_steps / max(1, steps)))


def weights_progress(spec: SAESpec, step: int, steps: int) -> float:
    """How far a step is on the way from `level_weights` to `level_weights_end`.

    The whole dictionary gains on its inner prefixes only once these have converged: at the end of a short run it is
    still they that lag (benchmarks/README.md).
    """
    return step / max(steps, spec.level_weights_steps)


def dead_window(spec: SAESpec, tokens: int, batch_size: int) -> int:
    """Tokens of silence after which a latent counts as dead."""
    if spec.dead_tokens is not None:
        return spec.dead_tokens
    return min(10_000_000, max(tokens // 150, 10 * batch_size))


def warmup_steps(spec: SAESpec, steps: int) -> int:
    """Steps of warm-up: what the spec says, or a twentieth of the run and at most 1000; never more than half of it.

    At twice the rate it takes half as long again: fewer latents die (benchmarks/README.md).
    """
    if spec.lr_warmup_steps is not None:
        return min(spec.lr_warmup_steps, steps // 2)
    return min(1000, int((1 + _haste(spec, steps)) / 2 * steps / 20), steps // 2)


def annealed_k(spec: SAESpec, k: float | None, step: int, steps: int) -> float | None:
    """Return k of a step: from `k_start` linearly to `k` over `k_anneal_steps` (a tenth of the run by default)."""
    if k is None or spec.k_start is None:
        return k
    duration = spec.k_anneal_steps if spec.k_anneal_steps is not None else max(1, steps // 10)
    left = max(0.0, 1 - step / duration)
    value = k + (spec.k_start - k) * left
    return value if isinstance(k, float) or left else k


def sparsity_warmup(spec: SAESpec, step: int, steps: int) -> float:
    """Share of the sparsity coefficient in force at a step, which grows over `sparsity_warmup_steps`.

    By default these are a fifth of the run (Nabeshima 2024). What begins at its target L0 needs none, and without a
    penalty would soon be far above it.
    """
    duration = spec.sparsity_warmup_steps
    if duration is None:
        duration = 0 if spec.starts_at_target else steps // 5
    return min(1.0, (step + 1) / (duration + 1))


def random_prefix_widths(spec: SAESpec, num_latents: int, seed: int, step: int) -> list[int]:
    """Prefix widths drawn for one step, the whole dictionary last.

    A width w has probability proportional to (w/F)^power - ((w-1)/F)^power for w below F, drawn without replacement
    (Nabeshima 2024; power 0.5: half of the draws fall below F/4). With a least width m, w - m + 1 and F - m + 1 take
    the place of w and F. The draw depends on seed and step alone: equal in every process and after a resume.
    """
    smallest = min(spec.min_prefix, num_latents)
    relative = torch.arange(0, num_latents - smallest + 1, dtype=torch.float64) / (num_latents - smallest + 1)
    odds = relative.pow(spec.prefix_power).diff()
    count = min(spec.random_prefixes - 1, len(odds))
    if count < 1:
        return [num_latents]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    # Gumbel top-k: a draw without replacement that has no limit on the number of categories.
    uniform = torch.rand(len(odds), generator=generator, dtype=torch.float64).clamp(min=1e-300)
    drawn = (odds.log() - (-uniform.log()).log()).topk(count).indices
    return [*sorted((drawn + smallest).tolist()), num_latents]
