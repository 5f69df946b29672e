"""`build_index`: one pass over text, from which every latent's page is made."""

import hashlib
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from ..activations import (
    DatasetConfig,
    Documents,
    TokenStream,
    load_documents,
    load_language_model,
    resolve_hookpoints,
)
from ..activations.language_model import EMBEDDED
from ..evaluation.distributed import processes
from ..models import SAEModel
from .ahead import ahead, shared_cores
from .best import MOST_POSITIONS
from .columns import context_tables, latent_columns
from .latent_pass import IndexSizes, LatentPass, Tree
from .layout import FOLDER, write_index
from .progress import States
from .store import FeatureIndex
from .sums import PROBABILITIES
from .tree import EdgeSums
from .windows import Fired, NumberedWindows, Position, fired_in, harvested


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
    resume: bool = True,
    save_every: int = 5_000_000,
    device: str | torch.device | None = None,
    show: bool = True,
) -> FeatureIndex:
    """Build the feature index of an SAE: what each latent fires on, what it does, and what is near it.

    One pass over the text. Memory depends on the SAE and on `sizes`, not on `tokens`. Under `torch.distributed` each
    process takes its share and all get the index that one process would build. A build that was cut short is
    continued by the same call, and an index that is there already, built with the same arguments, is opened.

    Args:
        sae ([`SAEModel`], `str` or `os.PathLike`): An SAE, its folder, or its Hub id.
        model (`str`, `os.PathLike` or `nn.Module`, *optional*): The language model: Hub id, folder, `"embedded"` or a
            transformers model; by default what the SAE names.
        dataset (`str`, `dict`, [`DatasetConfig`] or `list[str]`, *optional*): Text, as in a run's YAML; by default the
            embedded text.
        tokens (`int`, *optional*, defaults to 1,000,000): Positions to look at.
        output_dir (`str` or `os.PathLike`, *optional*): Folder in which `features/` is made; by default the SAE's.
        hookpoint (`str`, *optional*): Where the SAE reads; by default what it names.
        tokenizer (*optional*): By default the one that comes with the model.
        context_length (`int`, *optional*, defaults to 128), lm_batch_size (`int`, *optional*, defaults to 32): Tokens
            in a window that the language model sees, and windows in a batch.
        exclude (`str`, *optional*, defaults to `"special"`): Positions left out: `special`, `first` or `none`. How
            often a latent fires at the first position is counted in any case.
        sizes ([`IndexSizes`], *optional*): How much is kept.
        seed (`int`, *optional*, defaults to 0): Of the random samples.
        tree (*optional*): Finds parents and children of latents; by default [`EdgeSums`] of an SAE with several prefix
            widths, `False` for none.
        resume (`bool`, *optional*, defaults to `True`): Continue; `False` starts over.
        save_every (`int`, *optional*, defaults to 5,000,000): Tokens of a process between two saved states.
        device (`str` or `torch.device`, *optional*): Where model and SAE run, where they are not given as modules.
        show (`bool`, *optional*, defaults to `True`): Show a progress bar in the main process.

    Returns:
        [`FeatureIndex`].

    Raises:
        `ValueError`: if the model, its hookpoint or the text cannot be found, sizes are out of range, or hidden states
            are of another width than the SAE's or not finite.
    """
    sizes = sizes or IndexSizes()
    sizes.check()
    if not 1 <= tokens < MOST_POSITIONS // 2:
        raise ValueError(f"`tokens` must lie between 1 and {MOST_POSITIONS // 2 - 1}, got {tokens}.")
    if save_every < 1:
        raise ValueError(f"`save_every` must be at least 1, got {save_every}.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sae, folder = _opened_sae(sae, device)
    if tree is None and len(sae.prefix_widths) > 1:
        tree = EdgeSums(sae)
    tree = tree or None
    if output_dir is None and folder is None:
        raise ValueError("Name an `output_dir`: this SAE does not lie, as it is, in a folder it was loaded from.")
    target = Path(output_dir if output_dir is not None else folder).expanduser() / FOLDER
    name = str(model or sae.config.base_model or "") if not isinstance(model, nn.Module) else None
    place = hookpoint or sae.config.hookpoint
    if name == "" or place is None:
        raise ValueError("The SAE's config names no language model or no hookpoint; pass `model` and `hookpoint`.")
    lm, tokenizer = _opened_model(model if name is None else name, tokenizer, device)
    (place,) = resolve_hookpoints(lm, [place])
    dataset = _as_config(dataset)
    rank, world = processes()
    about = {
        "num_latents": sae.config.num_latents,
        "base_model": _public(name or getattr(lm, "name_or_path", "")) or type(lm).__name__,
        "tokenizer": _public(getattr(tokenizer, "name_or_path", "")),
        "hookpoint": place,
        "dataset": _described(dataset) if isinstance(dataset, DatasetConfig) else None,
        "tokens_wanted": tokens,
        "context_length": context_length,
        "lm_batch_size": lm_batch_size,
        "exclude": exclude,
        "seed": seed,
        "tree": tree is not None,
        "sizes": asdict(sizes) | {"context_tokens": min(sizes.context_tokens, context_length)},
        "weights": weights_digest(sae),
        "probabilities": list(PROBABILITIES),
        "versions": {
            name: importlib.metadata.version(name) for name in ("hf_matryoshka_sae", "torch", "transformers")
        },
    }
    if resume and (finished := _finished(target, about)) is not None:
        return finished
    documents = load_documents(dataset, tokenizer) if isinstance(dataset, DatasetConfig) else dataset
    stream = TokenStream(documents, tokenizer, context_length, lm_batch_size, exclude=exclude, num_epochs=1)
    windows = NumberedWindows(stream, tokens, rank, world)
    found = LatentPass(sae, sizes, context_length, seed, tree)
    states = States(target / _BUILDING, about, rank, world)
    if resume and (position := states.load(found)) is not None:
        windows.go_to(position)
    bar = tqdm(total=-(-tokens // world), desc="feature index", unit="tok", disable=rank != 0 or not show, leave=False)
    with bar, shared_cores(next(lm.parameters()).device, world) as overlapped:
        bar.update(int(found.sums.tokens))
        unsaved = 0
        batches = _overlapping(fired_in(sae, _overlapping(harvested(windows, lm, place), overlapped)), overlapped)
        with closing(batches):
            for chunk in _chunks(batches, found.batches_at_once(lm_batch_size, context_length)):
                found.add(chunk)
                done = sum(batch.tokens for batch in chunk)
                bar.update(done)
                unsaved += done
                if unsaved >= save_every:
                    states.save(found, chunk[-1].after)
                    unsaved = 0
    if world > 1:
        states.save(found, Position(windows.position.batches, windows.position.tokens, windows.stream.state_dict()))
        dist.barrier()
    if rank == 0:
        for other in range(1, world):
            found.merge(states.of(other))
    if tree is not None:
        tree.reduce()
    if rank == 0:
        _write(target, about, sae, lm, found, sizes, tree)
        shutil.rmtree(target / _BUILDING, ignore_errors=True)
    if world > 1:
        dist.barrier()
    return FeatureIndex.open(target)


def _described(dataset: DatasetConfig) -> dict[str, Any]:
    return asdict(dataset) | {"path": _public(str(dataset.path))}


def _public(name: str) -> str:
    """A name as others may see it: of a folder of this machine only its own name, as an index is pushed."""
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def weights_digest(sae: SAEModel) -> str:
    """SHA-256 over an SAE's tensors, by name: says of which weights an index is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# What is opened


def _opened_sae(sae: SAEModel | str | os.PathLike, device: torch.device) -> tuple[SAEModel, Path | None]:
    """The SAE, and the folder it came from."""
    if not isinstance(sae, SAEModel):
        source = str(Path(sae).expanduser()) if Path(sae).expanduser().is_dir() else str(sae)
        try:
            sae = AutoModel.from_pretrained(source).eval().to(device)
        except OSError as error:
            raise ValueError(f"No SAE can be loaded from {source!r}: {error}") from error
        if not isinstance(sae, SAEModel):
            raise ValueError(f"{source!r} is a {type(sae).__name__}, not an SAE.")
        return sae, _folder_of(sae)
    folder = _folder_of(sae)
    # What was cut, sorted or trained on since must not take the place of the index of the one it came from.
    if folder is not None and weights_digest(AutoModel.from_pretrained(folder)) != weights_digest(sae):
        folder = None
    return sae, folder


def _folder_of(sae: SAEModel) -> Path | None:
    folder = Path(sae.name_or_path or "/nowhere").expanduser()
    return folder if (folder / "config.json").is_file() else None


def _opened_model(model: str | nn.Module, tokenizer: Any, device: torch.device) -> tuple[nn.Module, Any]:
    if not isinstance(model, nn.Module):
        model, own = load_language_model(model, device=device)
        return model, tokenizer or own
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(getattr(model, "name_or_path", ""))
        except (OSError, ValueError) as error:
            raise ValueError(f"Pass the `tokenizer` of this {type(model).__name__}: {error}") from error
    return model.eval(), tokenizer


def _as_config(dataset: Any) -> Any:
    if dataset is None:
        return DatasetConfig(EMBEDDED, split="heldout")
    if isinstance(dataset, (str, os.PathLike)):
        return DatasetConfig(str(dataset))
    return DatasetConfig(**dataset) if isinstance(dataset, dict) else dataset


def _finished(target: Path, about: dict[str, Any]) -> FeatureIndex | None:
    """The index that is there, if it is of the same settings."""
    try:
        index = FeatureIndex.open(target)
    except ValueError:
        return None
    # A list of texts cannot be compared: it may be another one.
    same = about["dataset"] is not None and all(index.about.get(name) == value for name, value in about.items())
    return index if same else None


# The pass


def _overlapping(batches: Generator, overlapped: bool) -> Generator:
    """The same, in a thread of its own where there are cores for that."""
    return ahead(batches) if overlapped else batches


def _chunks(batches: Iterable[Fired], count: int) -> Iterator[list[Fired]]:
    """Batches in lists of `count`."""
    chunk: list[Fired] = []
    for batch in batches:
        chunk.append(batch)
        if len(chunk) == count:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write(
    target: Path,
    about: dict[str, Any],
    sae: SAEModel,
    lm: nn.Module,
    found: LatentPass,
    sizes: IndexSizes,
    tree: Tree | None,
) -> None:
    columns, why = latent_columns(sae, lm, found.sums, found.contexts, found.cofiring, sizes, tree)
    about = about | {"tokens": int(found.sums.tokens), "logits": why or "final norm's gain included, biases left out"}
    contexts = context_tables(found.contexts, about["context_length"], sizes.quantiles, sizes.quantile_contexts)
    write_index(target, about, columns, contexts)
