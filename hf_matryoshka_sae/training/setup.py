"""From a run's fields to its parts: language model, stream of hidden states, dictionaries."""

import fnmatch
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import AutoModel

from ..activations import (
    ActivationStatistics,
    ActivationStream,
    CachedActivationStream,
    DatasetConfig,
    PrefetchedStream,
    Split,
    TokenBatch,
    TokenStream,
    WindowShuffle,
    build_cache,
    cache_fingerprint,
    estimate_statistics,
    has_cache,
    heldout_batches,
    load_documents,
    load_language_model,
    resolve_hookpoints,
)
from ..models import SAEModel, build_sae
from .config import RunConfig, SAESpec
from .growth import grown_start
from .initialization import initialize, input_scaling
from .learner import Learner


logger = logging.getLogger(__name__)

_SAMPLE = 8192  # hidden states that initialisation looks at


@dataclass
class Harvest:
    """The language model and what flows out of it.

    Args:
        model (`nn.Module`): The language model.
        hookpoints (`list[str]`): Resolved.
        stream ([`ActivationStream`], [`CachedActivationStream`] or [`PrefetchedStream`]): Endless shuffled batches of
            hidden states on the SAEs' device, with a state.
        statistics (`dict[str, ActivationStatistics]`): Of each hookpoint.
        sample (`dict[str, Tensor]`): Some hidden states of each hookpoint, equal in all processes.
        heldout (`list[TokenBatch]`): Held-out tokens, the same in every process.
        mask_token_id (`int`, *optional*): Of a masked language model's tokenizer.
    """

    model: nn.Module
    hookpoints: list[str]
    stream: Any
    statistics: dict[str, ActivationStatistics]
    sample: dict[str, Tensor]
    heldout: list[TokenBatch]
    mask_token_id: int | None = None


def open_harvest(config: RunConfig, accelerator: Accelerator, batch_size: int) -> Harvest:
    """Load the language model, open the data and estimate each hookpoint's statistics.

    Everything that can be wrong with model, data or hookpoints is found here, before anything is trained.
    """
    lm_device = _lm_device(config, accelerator)
    model, tokenizer = load_language_model(config.model, config.model_revision, config.model_dtype, lm_device)
    hookpoints = resolve_hookpoints(model, config.hookpoints)
    heldout = open_heldout_text(config, tokenizer)
    stream = _stream(config, accelerator, model, tokenizer, hookpoints, batch_size)
    if overlaps(config.overlap, lm_device, accelerator.num_processes):
        stream = PrefetchedStream(stream)
    statistics = estimate_statistics(stream, -(-config.normalization_tokens // accelerator.num_processes))
    sample = {name: [] for name in hookpoints}
    for rows in stream.peek(_SAMPLE):
        for name, states in rows.items():
            sample[name].append(states.float())
    sample = broadcast({name: torch.cat(parts) for name, parts in sample.items()})
    for name, found in statistics.items():
        logger.info(
            f"{name}: d_in {len(found.mean)}, scale {found.scale:.4g}, largest |mean|/std of a dimension "
            f"{found.outlier_ratio:.3g}"
        )
    return Harvest(model, hookpoints, stream, statistics, sample, heldout, tokenizer.mask_token_id)


def _lm_device(config: RunConfig, accelerator: Accelerator) -> torch.device:
    """Where the language model runs; raises `ValueError` for a device that is not there or that processes share."""
    if config.lm_device is None:
        return accelerator.device
    try:
        device = torch.device(config.lm_device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it cannot use
        reason = str(error).splitlines()[0]
        raise ValueError(f"`lm_device: {config.lm_device}` cannot be used: {reason}") from error
    if device.type != "cpu" and accelerator.num_processes > 1:
        raise ValueError(
            f"`lm_device: {config.lm_device}` would hold the language models of all {accelerator.num_processes} "
            "processes. Leave it out, so that each runs beside its SAEs, or take `cpu`."
        )
    return device


def overlaps(wanted: bool | None, lm_device: torch.device, processes: int = 1) -> bool:
    """Whether the language model runs ahead in a thread of its own.

    Args:
        wanted (`bool`, *optional*): What the run's `overlap` says. By default it does so on a GPU, and on a CPU where
            torch's threads leave a core free for each process: every Python thread that calls torch has a pool of
            them, and two pools on the same cores only get in each other's way.
        lm_device (`torch.device`): Where the language model runs.
        processes (`int`, *optional*, defaults to 1): On this machine, where the launcher does not say.
    """
    if wanted is not None or lm_device.type != "cpu":
        return wanted is not False
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return cores - processes * torch.get_num_threads() >= processes


def _stream(
    config: RunConfig, accelerator: Accelerator, model: nn.Module, tokenizer, hookpoints: list[str], batch_size: int
) -> ActivationStream | CachedActivationStream:
    """Hidden states harvested as they are needed, or read from the run's activation cache, built first if need be."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    text = _token_stream(config, tokenizer, accelerator)
    shuffled = config.shuffle and config.pack
    tokens = WindowShuffle(text, config.window_pool_tokens, config.seed + rank) if shuffled else text
    dtype = torch.float32 if accelerator.device.type == "cpu" else None
    buffer_tokens = max(config.shuffle_tokens, 2 * batch_size + config.lm_batch_size * config.context_length)
    live = ActivationStream(
        model,
        tokens,
        hookpoints,
        batch_size,
        buffer_tokens,
        device=accelerator.device,
        dtype=dtype,
        seed=config.seed + rank,
        max_norm_factor=config.max_norm_factor,
    )
    if config.activation_cache is None:
        return live
    fingerprint = cache_fingerprint(
        model,
        text,
        config.dataset,
        hookpoints,
        dtype,
        max_norm_factor=config.max_norm_factor,
        documents=[
            config.shuffle,
            config.window_pool_tokens,
            config.seed,
            config.eval_fraction if config.eval_dataset is None else None,
        ],
    )
    if not has_cache(config.activation_cache):
        needed = -(-(config.tokens + config.calibration_tokens) // world_size)
        build_cache(config.activation_cache, live, needed, fingerprint, rank)
    return CachedActivationStream(
        config.activation_cache,
        fingerprint,
        hookpoints,
        batch_size,
        buffer_tokens,
        device=accelerator.device,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )


def _documents(config: RunConfig, tokenizer, held_out: bool, **options):
    documents = load_documents(config.dataset, tokenizer, **options)
    splits = config.eval_dataset is None and config.dataset.path != "embedded"
    return Split(documents, config.eval_fraction, held_out) if splits else documents


def _token_stream(config: RunConfig, tokenizer, accelerator: Accelerator) -> TokenStream:
    documents = _documents(
        config,
        tokenizer,
        held_out=False,
        shuffle=config.shuffle,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return TokenStream(
        documents,
        tokenizer,
        config.context_length,
        config.lm_batch_size,
        pack=config.pack,
        exclude=config.exclude,
    )


def open_heldout_text(config: RunConfig, tokenizer: Any) -> list[TokenBatch]:
    """The held-out tokens of a run: `eval_dataset`, or the share of the documents that training leaves out.

    Raises:
        `ValueError`: if there are none.
    """
    dataset: Any = config.eval_dataset
    if dataset is None and config.dataset.path == "embedded":
        dataset = DatasetConfig("embedded", split="heldout")
    if dataset is None:
        dataset = _documents(config, tokenizer, held_out=True)
    try:
        return heldout_batches(
            dataset,
            tokenizer,
            config.context_length,
            config.eval_tokens,
            config.lm_batch_size,
            pack=config.pack,
            exclude=config.exclude,
        )
    except ValueError as error:
        if config.eval_dataset is not None:
            raise
        raise ValueError(
            f"No held-out text: {error} Name an `eval_dataset`, or raise `eval_fraction` ({config.eval_fraction:g})."
        ) from error


def build_learners(config: RunConfig, accelerator: Accelerator, harvest: Harvest) -> list[Learner]:
    """Every dictionary of the run at each of its hookpoints.

    Raises:
        `ValueError`: if a spec does not fit its hookpoint, two dictionaries share a folder, or `init_from` or
            `grow_from` holds none that fits.
    """
    learners: list[Learner] = []
    for index, spec in enumerate(config.saes):
        for hookpoint in _hookpoints_of(spec, harvest.hookpoints):
            learner = _build(config, accelerator, harvest, spec, hookpoint, config.seed + index)
            if any((other.name, other.hookpoint) == (learner.name, hookpoint) for other in learners):
                raise ValueError(f"Two entries of `saes` are both called {learner.name!r}. Give each a `name`.")
            learners.append(learner)
    return learners


def _hookpoints_of(spec: SAESpec, hookpoints: list[str]) -> list[str]:
    if spec.hookpoints is None:
        return hookpoints
    chosen = [name for name in hookpoints if any(fnmatch.fnmatchcase(name, pattern) for pattern in spec.hookpoints)]
    if not chosen:
        raise ValueError(f"`hookpoints` {spec.hookpoints} of an SAE are none of the run's: {', '.join(hookpoints)}.")
    return chosen


def _build(
    config: RunConfig, accelerator: Accelerator, harvest: Harvest, spec: SAESpec, hookpoint: str, seed: int
) -> Learner:
    statistics, sample = harvest.statistics[hookpoint], harvest.sample[hookpoint]
    mean, scale = input_scaling(spec, statistics, sample)
    mean = mean.to(sample)
    d_in = len(mean)
    source, base = spec.init_from or config.init_from, None
    if spec.grow_from:
        start = load_start(spec.grow_from, spec, hookpoint, d_in, "grow_from")
        sae, base = grown_start(start, spec, hookpoint, mean, scale, sample, seed)
    elif source:
        start = load_start(source, spec, hookpoint, d_in)
        sae = build_sae(spec.sae_config(d_in, config.model, hookpoint, like=start.config))
        _take_over(sae, start, mean, scale, spec)
    else:
        sae = build_sae(spec.sae_config(d_in, config.model, hookpoint))
        initialize(sae, spec, (sample - mean) / scale, (statistics.mean.to(sample) - mean) / scale, seed)
    name = spec.folder(sae.config)
    return Learner(name, hookpoint, sae, spec, mean, scale, accelerator, config.steps, config.batch_size, seed, base)


def load_start(source: str, spec: SAESpec, hookpoint: str, d_in: int, field: str = "init_from") -> SAEModel:
    """The trained SAE that a run goes on from, or whose dictionary it makes larger.

    Args:
        source (`str`): A folder with an SAE, a run's folder, or a repository.
        spec ([`SAESpec`]): Its type must be the SAE's, unless that is to grow.
        hookpoint (`str`): Looked for as a subfolder first.
        d_in (`int`): Width of the hidden states now.
        field (`str`, *optional*, defaults to `"init_from"`): Or `"grow_from"`: who asks.

    Raises:
        `ValueError`: if there is none, or it does not fit.
    """
    place = hookpoint.replace(":", "-")
    root, asked = Path(source), f"`{field}: {source}`"
    folders = [root / place, *sorted(root.glob(f"*/{place}")), root]
    named = [folder for folder in folders if (folder / "config.json").is_file()]
    if root.is_dir() and not named:
        raise ValueError(f"{asked} holds no SAE: looked for config.json there and in {place}/.")
    if spec.name and (root / spec.name / place) in named:
        named = [root / spec.name / place]
    if field == "grow_from" and len(named) > 1:
        raise ValueError(f"{asked} holds several SAEs, name one: {', '.join(str(path.parent) for path in named)}.")
    try:
        sae = AutoModel.from_pretrained(named[0]) if named else AutoModel.from_pretrained(source, subfolder=place)
    except OSError as error:
        raise ValueError(f"{asked} cannot be loaded: {error}") from error
    if not isinstance(sae, SAEModel):
        raise ValueError(f"{asked} is a {type(sae).__name__}, not an SAE.")
    kind = sae.config.model_type.removesuffix("_sae")
    if kind != spec.type and field == "init_from":
        raise ValueError(f"{asked} holds an SAE of type {kind}, but the run asks for {spec.type}.")
    for unlike in ("input_normalization", "output_hookpoint"):
        if getattr(sae.config, unlike) is not None:
            raise ValueError(
                f"{asked} holds an SAE with `{unlike}: {getattr(sae.config, unlike)}`. Such can be loaded, measured "
                "and pruned, but not trained on."
            )
    if sae.config.d_in != d_in:
        raise ValueError(f"{asked} reads hidden states of width {sae.config.d_in}; {hookpoint} has {d_in}.")
    return sae


def _take_over(sae: SAEModel, start: SAEModel, mean: Tensor, scale: float, spec: SAESpec) -> None:
    """Give `sae` the weights of `start`, in the units of this run."""
    if spec.unit_norm_decoder:
        start.fold_decoder_norm_()
    start.fold_normalization_(-mean / scale, 1 / scale)
    sae.load_state_dict(start.state_dict())
    if hasattr(sae.config, "bandwidth"):
        sae.config.bandwidth = start.config.bandwidth
