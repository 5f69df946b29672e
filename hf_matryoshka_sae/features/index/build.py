"""`build_index`: build a feature index in one pass over text."""

import importlib.metadata
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from ... import __version__
from ...activations import DatasetConfig, Documents, TokenStream, load_documents, resolve_hookpoints
from ...common.ahead import ahead, shared_cores
from ...common.checks import check_at_least
from ...common.distributed import processes
from ...evaluation.data import as_config
from ...models import SAEModel
from ...models.digests import weights_digest
from ..showcase import index_showcase
from ..sizes import FOLDER, IndexSizes
from ..tree.sums import EdgeSums
from .best import MOST_POSITIONS
from .columns import context_tables, latent_columns
from .latent_pass import LatentPass, Tree
from .layout import write_index
from .progress import Recorder, States
from .sources import (
    check_target,
    described,
    opened_model,
    opened_sae,
    public_name,
    text_digest,
)
from .store import FeatureIndex
from .sums import PROBABILITIES
from .windows import NumberedWindows, Position, fired_in, harvested


logger = logging.getLogger(__name__)

_BUILDING = ".building"


def build_index(
    sae: SAEModel | str | os.PathLike,
    model: str | os.PathLike | nn.Module | None = None,
    dataset: str | dict[str, Any] | DatasetConfig | Documents | list[str] | None = None,
    tokens: int = 1_000_000,
    output_dir: str | os.PathLike | None = None,
    *,
    hookpoint: str | None = None,
    tokenizer: Any = None,
    context_length: int = 128,
    lm_batch_size: int = 32,
    exclude: str = "special",
    sizes: IndexSizes | None = None,
    seed: int = 0,
    tree: Tree | bool | None = None,
    showcase: bool = True,
    resume: bool = True,
    save_every: int = 5_000_000,
    device: str | torch.device | None = None,
    show: bool = True,
) -> FeatureIndex:
    """Build the feature index of an SAE: what each latent fires on, what it does, and which latents are near it.

    One pass over the text. Memory depends on the SAE and on `sizes`, not on `tokens`. Under `torch.distributed` each
    process takes its share, and every process returns the index that one process would build. The same call continues
    a build that was interrupted, also by Ctrl-C, and opens an index that was built with the same arguments before.

    Args:
        sae ([`SAEModel`], `str` or `os.PathLike`): An SAE, its folder, or its Hub id.
        model (`str`, `os.PathLike` or `nn.Module`, *optional*): The language model: Hub id, folder, `"embedded"` or a
            transformers model; by default the one that the SAE names.
        dataset (`str`, `dict`, [`DatasetConfig`] or `list[str]`, *optional*): Text, as in a run's YAML; by default the
            embedded text.
        tokens (`int`, *optional*, defaults to 1,000,000): Number of kept positions to encode.
        output_dir (`str` or `os.PathLike`, *optional*): Folder in which `features/` is created; by default the SAE's.
        hookpoint (`str`, *optional*): Module whose hidden states the SAE reads; by default the one it names.
        tokenizer (*optional*): The language model's tokenizer; by default the one that comes with the model.
        context_length (`int`, *optional*, defaults to 128): Tokens in a window of text.
        lm_batch_size (`int`, *optional*, defaults to 32): Windows in a batch of the language model.
        exclude (`str`, *optional*, defaults to `"special"`): Positions left out: `special`, `first` or `none`. How
            often a latent fires at the first position is counted in any case.
        sizes ([`IndexSizes`], *optional*): Numbers of contexts, tokens and relations kept of each latent.
        seed (`int`, *optional*, defaults to 0): Seed of the random samples.
        tree ([`EdgeSums`] or `bool`, *optional*): Sums from which parents of latents are derived; by default
            [`EdgeSums`] for an SAE with several prefix widths, `False` for none.
        showcase (`bool`, *optional*, defaults to `True`): Whether to measure the SAE at twelve widths and to read a
            sample text too, see [`measure_showcase`]. Of [`Documents`], which cannot be read again, it does not.
        resume (`bool`, *optional*, defaults to `True`): Whether to continue an earlier build; `False` starts over.
        save_every (`int`, *optional*, defaults to 5,000,000): Tokens of a process between two saved states.
        device (`str` or `torch.device`, *optional*): Device of model and SAE, where they are not given as modules.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar in the main process.

    Returns:
        [`FeatureIndex`]: The index, opened.

    Raises:
        `ValueError`: if the SAE, the model, its hookpoint or the text cannot be found, the index cannot be written,
            sizes are out of range, or weights or hidden states are not finite or of another width than the SAE's.
    """
    sizes = sizes or IndexSizes()
    sizes.check()
    if not 1 <= tokens < MOST_POSITIONS // 2:
        raise ValueError(f"`tokens` must lie between 1 and {MOST_POSITIONS // 2 - 1}, got {tokens}.")
    check_at_least(1, save_every=save_every)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sae, folder = opened_sae(sae, device)
    tree = (EdgeSums(sae) if len(sae.prefix_widths) > 1 else None) if tree is None else tree or None
    target = _target(output_dir, folder)
    name = str(model or sae.config.base_model or "") if not isinstance(model, nn.Module) else None
    place = hookpoint or sae.config.hookpoint
    if name == "" or place is None:
        raise ValueError("The SAE's config names no language model or no hookpoint; pass `model` and `hookpoint`.")
    lm, tokenizer = opened_model(model if name is None else name, tokenizer, device)
    (place,) = resolve_hookpoints(lm, [place])
    rank, world = processes()
    _warn_of_another_place(sae, place, rank)
    dataset = as_config(dataset)
    about = {
        "num_latents": sae.config.num_latents,
        "prefix_widths": list(sae.prefix_widths),
        "base_model": public_name(name or getattr(lm, "name_or_path", "")) or type(lm).__name__,
        "tokenizer": public_name(getattr(tokenizer, "name_or_path", "")),
        "hookpoint": place,
        "dataset": described(dataset) if isinstance(dataset, DatasetConfig) else None,
        "text": text_digest(dataset),
        "tokens_wanted": tokens,
        "context_length": context_length,
        "lm_batch_size": lm_batch_size,
        "exclude": exclude,
        "seed": seed,
        "tree": tree is not None,
        "sizes": asdict(sizes) | {"context_tokens": min(sizes.context_tokens, context_length)},
        "weights": weights_digest(sae),
        "probabilities": list(PROBABILITIES),
        "versions": {"hf_matryoshka_sae": __version__}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    # Of endless documents only the first are digested: enough to continue, not to call a finished index theirs.
    comparable = isinstance(dataset, (DatasetConfig, list))
    if resume and comparable and (finished := _finished(target, about)) is not None:
        return finished
    documents = load_documents(dataset, tokenizer) if isinstance(dataset, DatasetConfig) else dataset
    stream = TokenStream(documents, tokenizer, context_length, lm_batch_size, exclude=exclude, num_epochs=1)
    windows = NumberedWindows(stream, tokens, rank, world)
    latent_pass = LatentPass(sae, sizes, context_length, seed, tree)
    states = States(target / _BUILDING, about, rank, world)
    if resume and (position := states.load(latent_pass)) is not None:
        windows.go_to(position)
    bar = tqdm(total=-(-tokens // world), desc="feature index", unit="tok", disable=rank != 0 or not show, leave=False)
    recorder = Recorder(
        latent_pass, states, save_every, latent_pass.batches_at_once(lm_batch_size, context_length), bar
    )
    with bar, shared_cores(next(lm.parameters()).device, world) as overlapped, recorder.kept_when_interrupted():
        batches = _overlapping(fired_in(sae, _overlapping(harvested(windows, lm, place), overlapped)), overlapped)
        with closing(batches):
            recorder.add(batches)
        if world > 1:
            end = Position(windows.position.batches, windows.position.tokens, windows.stream.state_dict())
            states.save(latent_pass, end)
            dist.barrier()
            recorder.merge(map(states.of, range(1, world) if rank == 0 else ()))
        if tree is not None:
            tree.reduce()
        shown = None
        if showcase:
            text = (dataset if comparable else None, context_length, exclude)
            shown = index_showcase(sae, lm, tokenizer, place, folder, latent_pass, text, show)
        if rank == 0:
            columns, why = latent_columns(sae, lm, latent_pass, sizes)
            logits = why or "final norm's gain included, biases left out"
            contexts = context_tables(latent_pass.contexts, context_length, sizes)
            whole = about | {"tokens": int(latent_pass.sums.tokens), "logits": logits}
            write_index(target, whole, columns, contexts, shown)
            shutil.rmtree(target / _BUILDING, ignore_errors=True)
    if world > 1:
        dist.barrier()
    return FeatureIndex.open(target)


def _target(output_dir: str | os.PathLike | None, sae_folder: Path | None) -> Path:
    if output_dir is None and sae_folder is None:
        raise ValueError("Name an `output_dir`: this SAE does not lie, as it is, in a folder it was loaded from.")
    target = Path(output_dir if output_dir is not None else sae_folder).expanduser() / FOLDER
    check_target(target)
    return target


def _warn_of_another_place(sae: SAEModel, place: str, rank: int) -> None:
    own = sae.config.hookpoint
    if rank == 0 and own is not None and own.removesuffix(":output") != place:
        logger.warning(
            "This SAE reads '%s', as its config says, but the index is built at '%s': what its latents do there is "
            "not what they were trained to do.",
            own,
            place,
        )


def _finished(target: Path, about: dict[str, Any]) -> FeatureIndex | None:
    """Open the index in the folder if it was built with the same settings; else return `None`."""
    if not target.is_dir():
        return None
    try:
        index = FeatureIndex.open(target)
    except ValueError:
        return None
    return index if all(index.about.get(name) == value for name, value in about.items()) else None


# The pass


def _overlapping(batches: Generator, overlapped: bool) -> Generator:
    """Compute the batches in a thread of its own where there are cores for that."""
    return ahead(batches) if overlapped else batches
