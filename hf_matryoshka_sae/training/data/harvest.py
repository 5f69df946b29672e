"""From a run's fields to its hidden states: the language model, the readers of data, what is known of both."""

import itertools
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...activations import (
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
    wait_for_cache,
)
from ..config.run import RunConfig
from ..config.sizes import (
    LARGEST_POOL,
    calibration_tokens,
    eval_tokens,
    normalization_tokens,
    shuffle_tokens,
    window_pool_tokens,
)
from .feed import owner
from .placement import readers


logger = logging.getLogger(__name__)

_SAMPLE = 8192  # hidden states that initialisation looks at


@dataclass
class Harvest:
    """The language model and what flows out of it.

    Args:
        hookpoints (`list[str]`): Resolved.
        shapes (`dict[str, tuple[int, torch.dtype]]`): Width of each hookpoint, and the type of its rows.
        streams (`dict[int, stream]`): This process's readers by number: endless shuffled batches of hidden states on
            the SAEs' device, each with a state ([`ActivationStream`], [`CachedActivationStream`] or
            [`PrefetchedStream`]).
        statistics (`dict[str, ActivationStatistics]`): Of each hookpoint.
        sample (`dict[str, Tensor]`): Some hidden states of each hookpoint, equal in all processes.
        model (`nn.Module`, *optional*): The language model; `None` where this process only holds SAEs.
        heldout (`list[TokenBatch]`): Held-out tokens, the same in every process that has a model.
        mask_token_id (`int`, *optional*): Of a masked language model's tokenizer.
    """

    hookpoints: list[str]
    shapes: dict[str, tuple[int, torch.dtype]]
    streams: dict[int, Any]
    statistics: dict[str, ActivationStatistics]
    sample: dict[str, Tensor]
    model: nn.Module | None = None
    heldout: list[TokenBatch] = field(default_factory=list)
    mask_token_id: int | None = None

    def close(self) -> None:
        """End what the readers run in the background."""
        for stream in self.streams.values():
            stream.close()


def open_harvest(config: RunConfig, accelerator: Accelerator, rows: int, streams: int | None = None) -> Harvest:
    """Load the language model, open the data and estimate each hookpoint's statistics.

    Everything that can be wrong with model, data or hookpoints is found here, before anything is trained.

    Args:
        config ([`RunConfig`]), accelerator (`Accelerator`): The run and its processes.
        rows (`int`): Hidden states in a batch of each reader.
        streams (`int`, *optional*): Readers of the run; by default one for each process with a language model.
    """
    rank, number_of_readers = accelerator.process_index, readers(config, accelerator.num_processes)
    streams = streams or number_of_readers
    model, heldout, mask_token_id, hookpoints, own = None, [], None, [], {}
    if rank < number_of_readers:
        model, heldout, mask_token_id, tokenizer = open_language_model(config, accelerator)
        hookpoints = resolve_hookpoints(model, config.hookpoints)
        mine = [number for number in range(streams) if owner(number, streams, number_of_readers) == rank]
        own = _streams(config, accelerator, model, tokenizer, hookpoints, rows, mine, streams)
    elif config.activation_cache is not None and not has_cache(config.activation_cache):
        wait_for_cache()
    sample = {name: [] for name in hookpoints}
    with _reading_bar(config, accelerator, own) as bar:
        for part in own[0].peek(_SAMPLE, advance=bar.update) if 0 in own else ():
            for name, states in part.items():
                sample[name].append(states)
        (shapes, sizes), sample = _agree(sample, accelerator)
        empty = [{name: torch.empty(0, width, device=accelerator.device) for name, (width, _) in shapes.items()}]
        each = -(-normalization_tokens(config) // streams)
        peeked = itertools.chain(empty, *(stream.peek(each, advance=bar.update) for stream in own.values()))
        statistics = estimate_statistics(peeked, each * streams)
    for name, found in statistics.items():
        logger.info(
            f"{name}: d_in {len(found.mean)}, scale {found.scale:.4g}, largest |mean|/std of a dimension "
            f"{found.outlier_ratio:.3g}"
        )
    return Harvest(list(shapes), shapes, own, statistics, sample, model, heldout, mask_token_id)


def _reading_bar(config: RunConfig, accelerator: Accelerator, own: dict[int, Any]) -> tqdm:
    """A progress bar of the main process while shuffle buffers are filled for the first time."""
    return tqdm(
        total=sum(stream.buffer_tokens for stream in own.values()),
        unit="tok",
        unit_scale=True,
        desc="first hidden states",
        disable=not accelerator.is_main_process or config.activation_cache is not None,  # a cache needs no filling
        leave=False,
    )


def open_language_model(config: RunConfig, accelerator: Accelerator) -> tuple[nn.Module, list, int | None, Any]:
    """The language model of a run, its held-out tokens, its mask token, and its tokenizer."""
    device = _lm_device(config, accelerator)
    model, tokenizer = load_language_model(config.model, config.model_revision, config.model_dtype, device)
    heldout = open_heldout_text(config, tokenizer, accelerator.num_processes)
    return model, heldout, tokenizer.mask_token_id, tokenizer


def _agree(sample: dict[str, list[Tensor]], accelerator: Accelerator) -> tuple[tuple[dict, dict], dict[str, Tensor]]:
    """The widths, types and sizes of the first process's sample, and the sample itself, in all processes."""
    joined = {name: torch.cat(parts) for name, parts in sample.items() if parts}
    shapes = {name: (rows.shape[1], rows.dtype) for name, rows in joined.items()}
    told = [(shapes, {name: len(rows) for name, rows in joined.items()})]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(told, 0)
    shapes, sizes = told[0]
    for name, (width, _) in shapes.items():
        rows = joined.get(name, torch.empty(sizes[name], width, device=accelerator.device)).float()
        joined[name] = broadcast(rows) if accelerator.num_processes > 1 else rows
    return told[0], {name: joined[name] for name in shapes}


def _lm_device(config: RunConfig, accelerator: Accelerator) -> torch.device:
    """Where the language model runs; raises `ValueError` for a device that is not there or that processes share."""
    if config.lm_device is None:
        return accelerator.device
    device = usable_device(config.lm_device, "lm_device")
    if device.type != "cpu" and accelerator.num_processes > 1:
        raise ValueError(
            f"`lm_device: {config.lm_device}` would hold the language models of all {accelerator.num_processes} "
            "processes. Leave it out, so that each runs beside its SAEs, or take `cpu`."
        )
    return device


def usable_device(name: str, field: str) -> torch.device:
    """A device of this process; raises `ValueError` with the `field` that asks for it where it is not there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it cannot use
        reason = str(error).splitlines()[0]
        raise ValueError(f"`{field}: {name}` cannot be used: {reason}") from error
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


def _streams(
    config: RunConfig,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: Any,
    hookpoints: list[str],
    rows: int,
    mine: list[int],
    streams: int,
) -> dict[int, ActivationStream | CachedActivationStream | PrefetchedStream]:
    """This process's readers: hidden states as they are needed, or from the run's cache, built first if need be."""
    parts = config, accelerator.device, model, tokenizer, hookpoints, rows
    if config.activation_cache is not None and not has_cache(config.activation_cache):
        rank, writers = accelerator.process_index, readers(config, accelerator.num_processes)
        live, fingerprint = live_stream(*parts, rank, writers)
        share = -(-(config.tokens + calibration_tokens(config)) // writers)
        build_cache(config.activation_cache, live, share, fingerprint, rank, writers, config.activation_cache_dtype)
    found: dict[int, Any] = {}
    for number in mine:
        live, fingerprint = live_stream(*parts, number, streams)
        cached = config.activation_cache is not None
        found[number] = _cached(config, accelerator, live, fingerprint, number, streams) if cached else live
    # Two threads cannot share a language model.
    device = next(model.parameters()).device
    if len(found) == 1 and overlaps(config.overlap, device, accelerator.num_processes):
        found = {number: PrefetchedStream(stream) for number, stream in found.items()}
    return found


def _cached(
    config: RunConfig,
    accelerator: Accelerator,
    live: ActivationStream,
    fingerprint: dict[str, Any],
    number: int,
    streams: int,
) -> CachedActivationStream:
    """The rows of the run's cache that fall to one of its streams."""
    cached = CachedActivationStream(
        config.activation_cache,
        fingerprint,
        live.hookpoints,
        live.batch_size,
        live.buffer_tokens,
        device=accelerator.device,
        dtype=live.dtype,
        seed=config.seed,
        rank=number,
        world_size=streams,
        stored_as=config.activation_cache_dtype,
    )
    needed = config.tokens + calibration_tokens(config)
    if cached.num_cached < needed and number == 0:
        logger.warning(
            f"The activation cache has {cached.num_cached} rows, the run needs {needed}: it will read them "
            f"{needed / cached.num_cached:.3g} times."
        )
    return cached


def live_stream(
    config: RunConfig,
    device: torch.device,
    model: nn.Module,
    tokenizer: Any,
    hookpoints: list[str],
    batch_size: int,
    rank: int,
    world_size: int,
) -> tuple[ActivationStream, dict[str, Any]]:
    """One of `world_size` shares of a run's hidden states as the model gives them, and the fingerprint of all."""
    text = _token_stream(config, tokenizer, rank, world_size)
    shuffled = config.shuffle and config.pack
    live = ActivationStream(
        model,
        WindowShuffle(text, window_pool_tokens(config, world_size), config.seed + rank) if shuffled else text,
        hookpoints,
        batch_size,
        max(shuffle_tokens(config, world_size), 2 * batch_size + config.lm_batch_size * config.context_length),
        device=device,
        dtype=torch.float32 if device.type == "cpu" else None,
        seed=config.seed + rank,
        max_norm_factor=config.max_norm_factor,
    )
    documents = [
        config.shuffle,
        # Not the share of a short run: a cache serves runs of any length, windows are drawn at random either way.
        config.window_pool_tokens or LARGEST_POOL,
        config.seed,
        config.eval_fraction if config.eval_dataset is None else None,
    ]
    return live, cache_fingerprint(
        model, text, config.dataset, hookpoints, max_norm_factor=config.max_norm_factor, documents=documents
    )


def _documents(config: RunConfig, tokenizer, held_out: bool, **options):
    documents = load_documents(config.dataset, tokenizer, **options)
    splits = config.eval_dataset is None and config.dataset.path != "embedded"
    return Split(documents, config.eval_fraction, held_out) if splits else documents


def _token_stream(config: RunConfig, tokenizer, rank: int, world_size: int) -> TokenStream:
    documents = _documents(
        config,
        tokenizer,
        held_out=False,
        shuffle=config.shuffle,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )
    return TokenStream(
        documents,
        tokenizer,
        config.context_length,
        config.lm_batch_size,
        pack=config.pack,
        exclude=config.exclude,
    )


def open_heldout_text(config: RunConfig, tokenizer: Any, processes: int = 1) -> list[TokenBatch]:
    """The held-out tokens of a run: `eval_dataset`, or the share of the documents that training leaves out.

    Batches are so small that each of `processes` gets one.

    Raises:
        `ValueError`: if there are none.
    """
    dataset: Any = config.eval_dataset
    if dataset is None and config.dataset.path == "embedded":
        dataset = DatasetConfig("embedded", split="heldout")
    if dataset is None:
        dataset = _documents(config, tokenizer, held_out=True)
    windows, tokens = config.lm_batch_size, eval_tokens(config)
    if processes > 1:
        windows = max(1, min(windows, tokens // (config.context_length * processes)))
    try:
        return heldout_batches(
            dataset,
            tokenizer,
            config.context_length,
            tokens,
            windows,
            pack=config.pack,
            exclude=config.exclude,
        )
    except ValueError as error:
        if config.eval_dataset is not None:
            raise
        raise ValueError(
            f"No held-out text: {error} Name an `eval_dataset`, or raise `eval_fraction` ({config.eval_fraction:g})."
        ) from error
