"""Train the published run of the toy model (noanabeshima/matryoshka-saes) with this package's own learner.

Differences: the input's scale is measured once instead of as a running average, and nothing runs in half precision.
"""

from collections.abc import Callable
from itertools import islice

from accelerate import Accelerator

from ...activations import estimate_statistics
from ...common.checks import check_at_least
from ...common.seeds import derived_seed
from ...models import SAEModel, build_sae
from ...training.config.spec import SAESpec
from ...training.sae.calibration import calibrate_threshold
from ...training.sae.initialization import initialize, input_scaling
from ...training.sae.learner import Learner
from .model import ToyModel
from .settings import PUBLISHED_L0, TOY_BATCH_SIZE, TOY_STEPS
from .synthetic import SyntheticModel


FAMILIES = {"vanilla": dict(random_prefixes=1, sort_every=0), "matryoshka": dict(random_prefixes=10, sort_every=1)}
"""Fields in which the two differ: the vanilla SAE has one prefix, the whole dictionary, and is not sorted."""

_SAMPLE = 8192  # hidden states that the input's scale is measured on


def toy_spec(family: str, num_latents: int, target_l0: float = PUBLISHED_L0) -> SAESpec:
    """Return the spec of the published objective and optimiser.

    Args:
        family (`str`): Family: `vanilla` or `matryoshka`.
        num_latents (`int`): Number of latents.
        target_l0 (`float`, *optional*, defaults to 1.2338): L0 to which the sparsity coefficient is adapted.

    Raises:
        `ValueError`: for another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {', '.join(FAMILIES)}, got {family!r}.")
    fields = dict(preset="nabeshima", num_latents=num_latents, target_l0=target_l0, sparsity_coefficient=0.2)
    fields["lr"] = 3e-2  # published; the preset's own suits runs that are shorter than this toy's
    return SAESpec.from_dict({**fields, **FAMILIES[family]}, "")


def train_toy(
    model: ToyModel | SyntheticModel,
    spec: SAESpec,
    accelerator: Accelerator,
    steps: int = TOY_STEPS,
    seed: int = 0,
    on_step: Callable[[int, Learner], None] | None = None,
    batch_size: int = TOY_BATCH_SIZE,
) -> SAEModel:
    """Train an SAE on a toy model.

    Args:
        model ([`ToyModel`] or [`SyntheticModel`]): Source of the hidden states.
        spec ([`SAESpec`]): Spec of the SAE, for example that of [`toy_spec`].
        accelerator (`Accelerator`): Accelerator of one process.
        steps (`int`, *optional*, defaults to 40,000): Number of optimizer steps.
        seed (`int`, *optional*, defaults to 0): Seed of first weights, prefixes and samples.
        on_step (`Callable`, *optional*): Called after each step with its number, from 0, and the learner.
        batch_size (`int`, *optional*, defaults to 200): Samples in a step.

    Returns:
        [`SAEModel`]: SAE of raw hidden states, in `eval` mode.

    Raises:
        `ValueError`: if there is no step to do, or there are several processes.
    """
    check_at_least(1, steps=steps, batch_size=batch_size)
    if accelerator.num_processes > 1:
        raise ValueError(f"The toy model trains in one process, got {accelerator.num_processes}.")
    learner = _learner(model, spec, accelerator, steps, batch_size, seed)
    for step, x in enumerate(islice(model.batches(batch_size, seed), steps)):
        learner.accumulate(x, step)
        learner.step(step)
        if on_step is not None:
            on_step(step, learner)
    sae = learner.finished()
    if sae.config.activation_name == "batch_topk":
        sample = next(model.batches(_SAMPLE, derived_seed(seed, "calibration"))).to(learner.mean)
        calibrate_threshold(sae, ((sample - learner.mean) / learner.scale).split(batch_size), learner.k)
    sae.fold_normalization_(learner.mean, learner.scale)
    return sae.cpu()


def _learner(
    model: ToyModel | SyntheticModel, spec: SAESpec, accelerator: Accelerator, steps: int, batch_size: int, seed: int
) -> Learner:
    # The scale is measured on other samples than those of the training.
    sample = next(model.batches(_SAMPLE, derived_seed(seed, "scale")))
    statistics = estimate_statistics([{"toy": sample}], len(sample))["toy"]
    mean, scale = input_scaling(spec, statistics, sample)
    sae = build_sae(spec.sae_config(sample.shape[1], "toy", "toy"))
    initialize(sae, spec, (sample - mean) / scale, (statistics.mean - mean) / scale, seed)
    shape = {"steps": steps, "batch_size": batch_size, "seed": seed}
    return Learner(spec.type, "toy", sae, spec, mean, scale, accelerator, **shape)
