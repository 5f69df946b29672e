"""The hidden states of text: a run's language model, its training and held-out text, its cache."""

import logging
import os
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ...activations import (
    ActivationStream,
    CachedActivationStream,
    DatasetConfig,
    PrefetchedStream,
    RowStream,
    Split,
    TokenBatch,
    TokenStream,
    WindowShuffle,
    build_cache,
    cache_fingerprint,
    has_cache,
    heldout_batches,
    load_documents,
    load_language_model,
    resolve_hookpoints,
    wait_for_cache,
)
from ...activations.sentences import SENTENCE_EMBEDDING, load_sentence_transformer, sentence_embeddings
from ...common.logs import is_first_process
from ...evaluation import HeldOut
from ..config.run import LARGEST_POOL, RunConfig, calibration_tokens, eval_tokens, shuffle_tokens, window_pool_tokens
from .placement import Processes


logger = logging.getLogger(__name__)


class TextSource:
    """The hidden states of a run's text. Each part is opened when it is first asked for.

    Args:
        config ([`RunConfig`]), accelerator (`Accelerator`): The run and its processes.
        processes ([`Processes`]): What each does.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, processes: Processes) -> None:
        self.config, self.accelerator, self.processes = config, accelerator, processes
        self.fills_buffers = config.activation_cache is None

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        """The language model and its tokenizer."""
        config, device = self.config, lm_device(self.config, self.accelerator)
        return load_language_model(config.model, config.model_revision, config.model_dtype, device)

    @property
    def model(self) -> nn.Module:
        """The language model."""
        return self._loaded[0]

    @cached_property
    def heldout_batches(self) -> list[TokenBatch]:
        """Held-out tokens, the same in every process."""
        return open_heldout_text(self.config, self._loaded[1], self.processes.world)

    def heldout(self, hookpoint: str) -> HeldOut:
        """What dictionaries of a hookpoint are evaluated on at the end."""
        tokenizer = self._loaded[1]
        return HeldOut(self.model, self.heldout_batches, hookpoint, tokenizer.mask_token_id, tokenizer)

    @cached_property
    def hookpoints(self) -> list[str]:
        """The module paths for which the run's globs stand."""
        return resolve_hookpoints(self.model, self.config.hookpoints)

    def streams(self) -> dict[int, RowStream]:
        """This process's readers by number: of text, or of the run's cache, which is built first if need be."""
        config, processes = self.config, self.processes
        cache = config.activation_cache
        if not processes.reads:
            if cache is not None and not has_cache(cache):
                wait_for_cache()
            return {}
        self.heldout_batches  # noqa: B018 (what is wrong with the held-out text is said before training)
        if cache is not None and not has_cache(cache):
            rank, writers = processes.rank, processes.readers
            live, fingerprint = self.live_stream(processes.rows, rank, writers)
            share = -(-(config.tokens + calibration_tokens(config)) // writers)
            build_cache(cache, live, share, fingerprint, rank, writers, config.activation_cache_dtype)
        streams: dict[int, RowStream] = {}
        for number in processes.own_streams:
            live, fingerprint = self.live_stream(processes.rows, number, processes.streams)
            streams[number] = live if cache is None else self._cached(live, fingerprint, number)
        # Two threads cannot share a language model.
        device = next(self.model.parameters()).device
        if len(streams) == 1 and overlaps(config.overlap, device, processes.world):
            return {number: PrefetchedStream(stream) for number, stream in streams.items()}
        return streams

    def _cached(self, live: ActivationStream, fingerprint: dict[str, Any], number: int) -> CachedActivationStream:
        """The rows of the run's cache that fall to one of its streams."""
        config = self.config
        cached = CachedActivationStream(
            config.activation_cache,
            fingerprint,
            live.hookpoints,
            live.batch_size,
            live.buffer_tokens,
            device=self.accelerator.device,
            dtype=live.dtype,
            seed=config.seed,
            rank=number,
            world_size=self.processes.streams,
            stored_as=config.activation_cache_dtype,
        )
        needed = config.tokens + calibration_tokens(config)
        if cached.num_cached < needed and number == 0:
            logger.warning(
                f"The activation cache has {cached.num_cached} rows, the run needs {needed}: it will read them "
                f"{needed / cached.num_cached:.3g} times."
            )
        return cached

    def live_stream(self, batch_size: int, rank: int, world_size: int) -> tuple[ActivationStream, dict[str, Any]]:
        """One of `world_size` shares of the hidden states as the model gives them, and the fingerprint of all."""
        config, (model, tokenizer), device = self.config, self._loaded, self.accelerator.device
        text = _token_stream(config, tokenizer, rank, world_size)
        shuffled = config.shuffle and config.pack
        live = ActivationStream(
            model,
            WindowShuffle(text, window_pool_tokens(config, world_size), config.seed + rank) if shuffled else text,
            self.hookpoints,
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
        options = {"max_norm_factor": config.max_norm_factor, "documents": documents}
        return live, cache_fingerprint(model, text, config.dataset, self.hookpoints, **options)


def lm_device(config: RunConfig, accelerator: Accelerator) -> torch.device:
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


def _documents(config: RunConfig, tokenizer: Any, held_out: bool, **options: Any) -> Any:
    documents = load_documents(config.dataset, tokenizer, **options)
    splits = config.eval_dataset is None and config.dataset.path != "embedded"
    return Split(documents, config.eval_fraction, held_out) if splits else documents


def _token_stream(config: RunConfig, tokenizer: Any, rank: int, world_size: int) -> TokenStream:
    share = {"shuffle": config.shuffle, "seed": config.seed, "rank": rank, "world_size": world_size}
    documents, size = _documents(config, tokenizer, held_out=False, **share), config.context_length
    return TokenStream(documents, tokenizer, size, config.lm_batch_size, pack=config.pack, exclude=config.exclude)


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
        size, which = config.context_length, {"pack": config.pack, "exclude": config.exclude}
        return heldout_batches(dataset, tokenizer, size, tokens, windows, **which)
    except ValueError as error:
        if config.eval_dataset is not None:
            raise
        raise ValueError(
            f"No held-out text: {error} Name an `eval_dataset`, or raise `eval_fraction` ({config.eval_fraction:g})."
        ) from error


def sentence_rows(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The embeddings of a run's texts, `(N, D)`, and of its held-out ones where it names any; in every process.

    Raises:
        `ValueError`: if the run has other hookpoints too, or the model or its text cannot be read.
    """
    if len(config.hookpoints) > 1:
        raise ValueError(f"`{SENTENCE_EMBEDDING}` must be a run's only hookpoint, got {config.hookpoints}.")
    model = load_sentence_transformer(config.model, config.model_revision)
    options = {"seed": config.seed, "batch_size": config.lm_batch_size, "show": is_first_process()}
    rows = sentence_embeddings(model, config.dataset, config.tokens, **options)
    if config.eval_dataset is None:
        return rows, None
    return rows, sentence_embeddings(model, config.eval_dataset, eval_tokens(config), **options)
