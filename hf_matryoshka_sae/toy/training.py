"""The published run of the toy model (noanabeshima/matryoshka-saes), through this package's own learner.

What differs from it: the input's scale is measured once instead of averaged as it goes, and nothing runs in half
precision.
"""

from collections.abc import Callable
from itertools import islice

from accelerate import Accelerator

from ..activations import estimate_statistics
from ..models import SAEModel, build_sae
from ..training.config import SAESpec
from ..training.initialization import initialize, input_scaling
from ..training.learner import Learner
from .model import ToyModel


STEPS = 40_000
BATCH_SIZE = 200
PUBLISHED_L0 = 1.2338  # of another tree: that of the published tree is 1.12

FAMILIES = {"vanilla": dict(random_prefixes=1, sort_every=0), "matryoshka": dict(random_prefixes=10, sort_every=1)}
"""What tells the two apart: the vanilla SAE has one prefix, the whole dictionary, and is not sorted."""

_SAMPLE = 8192  # hidden states that the input's scale is measured on


def toy_spec(family: str, num_latents: int, target_l0: float = PUBLISHED_L0) -> SAESpec:
    """The published objective and optimiser.

    Args:
        family (`str`): `vanilla` or `matryoshka`.
        num_latents (`int`): F.
        target_l0 (`float`, *optional*, defaults to 1.2338): What the sparsity coefficient is led by.

    Raises:
        `ValueError`: for another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {', '.join(FAMILIES)}, got {family!r}.")
    fields = dict(preset="nabeshima", num_latents=num_latents, target_l0=target_l0, sparsity_coefficient=0.2)
    return SAESpec.from_dict({**fields, **FAMILIES[family]}, "")


def train_toy(
    model: ToyModel,
    spec: SAESpec,
    accelerator: Accelerator,
    steps: int = STEPS,
    seed: int = 0,
    on_step: Callable[[int, Learner], None] | None = None,
) -> SAEModel:
    """Train an SAE on a toy model.

    Args:
        model ([`ToyModel`]): Where hidden states come from.
        spec ([`SAESpec`]): For example that of [`toy_spec`].
        accelerator (`Accelerator`): Of one process.
        steps (`int`, *optional*, defaults to 40,000): Of 200 samples each.
        seed (`int`, *optional*, defaults to 0): Of first weights, prefixes and samples.
        on_step (`Callable`, *optional*): Called after each step with its number, from 0, and the learner.

    Returns:
        [`SAEModel`] that takes raw hidden states, in `eval` mode.

    Raises:
        `ValueError`: if there is no step to do, or there are several processes.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if accelerator.num_processes > 1:
        raise ValueError(f"The toy model trains in one process, got {accelerator.num_processes}.")
    learner = _learner(model, spec, accelerator, steps, seed)
    for step, x in enumerate(islice(model.batches(BATCH_SIZE, seed), steps)):
        learner.accumulate(x, step)
        learner.step(step)
        if on_step is not None:
            on_step(step, learner)
    sae = learner.finished()
    sae.fold_normalization_(learner.mean, learner.scale)
    return sae.cpu()


def _learner(model: ToyModel, spec: SAESpec, accelerator: Accelerator, steps: int, seed: int) -> Learner:
    # Seeds of samples must differ: the scale is measured on others than those trained on.
    sample = next(model.batches(_SAMPLE, seed + 2**32))
    statistics = estimate_statistics([{"toy": sample}], len(sample))["toy"]
    mean, scale = input_scaling(spec, statistics, sample)
    sae = build_sae(spec.sae_config(sample.shape[1], "toy", "toy"))
    initialize(sae, spec, (sample - mean) / scale, (statistics.mean - mean) / scale, seed)
    return Learner(spec.type, "toy", sae, spec, mean, scale, accelerator, steps, BATCH_SIZE, seed)
