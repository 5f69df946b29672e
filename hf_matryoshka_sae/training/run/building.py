"""From a run's fields to its dictionaries: new ones, those of a trained SAE, or a larger one around it."""

import copy
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from ...convert.places import SAEPlace, saes_in
from ...convert.source import first_names
from ...models import MODELS, SAEConfig, SAEModel, build_sae
from ...models.sharding import Layout
from ..config.fields import errors_named
from ..config.run import RunConfig
from ..config.spec import SAESpec
from ..data.harvest import Harvest
from ..data.placement import Meshes, Placement
from ..data.text import usable_device
from ..sae.growth import grown_start
from ..sae.initialization import initialize, input_scaling, start_at_target
from ..sae.learner import Learner
from ..sae.sharded_files import load_own_rows


def build_learners(
    config: RunConfig,
    accelerator: Accelerator,
    harvest: Harvest,
    placements: list[Placement] | None = None,
) -> list[Learner]:
    """Every dictionary that this process trains, or its part of it, at each of the run's hookpoints.

    Args:
        config ([`RunConfig`]): The run.
        accelerator (`Accelerator`): Owner of devices and processes.
        harvest ([`Harvest`]): Source of the hidden states.
        placements (`list[Placement]`, *optional*): Places of all dictionaries; by default all processes train each.

    Raises:
        `ValueError`: if a spec does not fit its hookpoint, two dictionaries share a folder, or `init_from` or
            `grow_from` holds none that fits.
    """
    if placements is None:
        placements = harvest.processes.place(config, harvest.hookpoints)
    meshes, learners = Meshes(accelerator, placements), []
    for placement in placements:
        if accelerator.process_index not in placement.ranks:
            continue
        learner = _build(config, accelerator, harvest, placement, meshes)
        if any((other.name, other.hookpoint) == (learner.name, learner.hookpoint) for other in learners):
            raise ValueError(f"Two entries of `saes` are both called {learner.name!r}. Give each a `name`.")
        learners.append(learner)
    return learners


def _build(
    config: RunConfig, accelerator: Accelerator, harvest: Harvest, placement: Placement, meshes: Meshes
) -> Learner:
    spec, hookpoint, seed = config.saes[placement.index], placement.hookpoint, config.seed + placement.index
    statistics, sample = harvest.statistics[hookpoint], harvest.sample[hookpoint]
    mean, scale = input_scaling(spec, statistics, sample)
    mean = mean.to(sample)
    d_in = len(mean)
    source, base, start, threshold = spec.init_from or config.init_from, None, None, None
    if spec.grow_from:
        grown = find_start(spec.grow_from, spec, hookpoint, d_in, "grow_from").load()
        sae, base = grown_start(grown, spec, hookpoint, mean, scale, sample, seed)
        whole, layout = sae.config, meshes.layout(placement, sae.config.num_latents, config.capacity_factor)
    else:
        if source:
            start = find_start(source, spec, hookpoint, d_in)
        with errors_named(f"saes.{placement.index}"):
            whole = spec.sae_config(d_in, config.model, hookpoint, like=None if start is None else start.config)
        layout = meshes.layout(placement, whole.num_latents, config.capacity_factor)
        sae = build_sae(own_config(whole, layout))
        if start is not None:
            _take_over(sae, start.load(layout), mean, scale, spec)
        else:
            normalised = (sample - mean) / scale
            initialize(sae, spec, normalised, (statistics.mean.to(sample) - mean) / scale, seed, layout)
            threshold = start_at_target(sae, spec, normalised, seed, layout)
    return Learner(
        spec.folder(whole),
        hookpoint,
        sae,
        spec,
        mean,
        scale,
        accelerator,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=seed,
        base=base,
        layout=layout,
        config=whole,
        first_threshold=threshold,
        device=None if spec.device is None else usable_device(spec.device, f"saes.{placement.index}.device"),
    )


def own_config(config: SAEConfig, layout: Layout) -> SAEConfig:
    """The config of the latents that this process holds."""
    start, stop = layout.rows
    own = copy.deepcopy(config)
    for name, value in config.truncated(stop - start).items():
        setattr(own, name, value)
    return own


@dataclass(frozen=True)
class Start:
    """A trained SAE that a run begins with.

    Args:
        asked (`str`): The field that names it, for messages.
        place ([`SAEPlace`]): Where it lies.
        config ([`SAEConfig`]): Of the whole dictionary.
    """

    asked: str
    place: SAEPlace
    config: SAEConfig

    def load(self, layout: Layout | None = None) -> SAEModel:
        """The SAE; of a sharded dictionary the latents of this process, and no others are read."""
        place = self.place
        try:
            if layout is None or layout.shards == 1:
                return place.load()
            if place.config is None:
                raise ValueError(f"{self.asked} is another library's, which is not read in parts: convert it first.")
            own, source = own_config(self.config, layout), str(place.folder or place.source)
            subfolder = "" if place.folder else place.subfolder
            return load_own_rows(MODELS[type(self.config)], own, source, layout, subfolder=subfolder)
        except OSError as error:
            raise ValueError(f"{self.asked} cannot be loaded: {error}") from error


def find_start(source: str, spec: SAESpec, hookpoint: str, d_in: int, field: str = "init_from") -> Start:
    """Where the trained SAE is that a run goes on from, or whose dictionary it makes larger.

    Args:
        source (`str`): A folder with an SAE, a run's folder, a file of weights, or a repository; of any format.
        spec ([`SAESpec`]): Its type must be the SAE's, unless that is to grow.
        hookpoint (`str`): Which of several: the one in the folder of this name.
        d_in (`int`): Width of the hidden states now.
        field (`str`, *optional*, defaults to `"init_from"`): Or `"grow_from"`: who asks.

    Raises:
        `ValueError`: if there is none, or it does not fit.
    """
    inner, asked = hookpoint.replace(":", "-"), f"`{field}: {source}`"
    try:
        saes = saes_in(source)
        places = {place: sae for place, sae in saes.items() if place in ("", inner) or place.endswith(f"/{inner}")}
        if spec.name and f"{spec.name}/{inner}" in places:
            places = {inner: places[f"{spec.name}/{inner}"]}
        if field == "grow_from" and len(places) > 1:
            raise ValueError(f"{asked} holds several SAEs, name one: {', '.join(places)}.")
        if not places:
            raise ValueError(f"{asked} holds no SAE at {inner}. It holds: {first_names(list(saes))}.")
        place = places[min(places, key=lambda place: (place.count("/"), place))]  # its own folder before a run's
        config = place.load_config()
    except OSError as error:
        raise ValueError(f"{asked} cannot be loaded: {error}") from error
    except ValueError as error:
        raise error if asked in str(error) else ValueError(f"{asked} cannot be loaded: {error}") from error
    kind = config.model_type.removesuffix("_sae")
    if kind != spec.type and field == "init_from":
        raise ValueError(f"{asked} holds an SAE of type {kind}, but the run asks for {spec.type}.")
    for unlike in ("input_normalization", "output_hookpoint", "refine_steps"):
        if getattr(config, unlike):
            raise ValueError(
                f"{asked} holds an SAE with `{unlike}: {getattr(config, unlike)}`. Such can be loaded, measured "
                "and pruned, but not trained on."
            )
    if config.d_in != d_in:
        raise ValueError(f"{asked} reads hidden states of width {config.d_in}; {hookpoint} has {d_in}.")
    return Start(asked, place, config)


def _take_over(sae: SAEModel, start: SAEModel, mean: Tensor, scale: float, spec: SAESpec) -> None:
    """Give `sae` the weights of `start`, in the units of this run."""
    if spec.unit_norm_decoder:
        start.fold_decoder_norm_()
    start.fold_normalization_(-mean / scale, 1 / scale)
    sae.load_state_dict(start.state_dict())
    if hasattr(sae.config, "bandwidth"):
        sae.config.bandwidth = start.config.bandwidth
