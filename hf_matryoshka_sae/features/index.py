"""`build_index`: one pass over text, from which every latent's page is made."""

import hashlib
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
from ..models.sparse_ops import LatentPairs
from .ahead import ahead, shared_cores
from .best import MOST_POSITIONS
from .cofiring import TokenSample
from .columns import context_tables, latent_columns
from .contexts import Contexts
from .progress import load_state, save_state, state_file
from .store import FOLDER, FeatureIndex, write_index
from .sums import PROBABILITIES, LatentSums
from .windows import Fired, NumberedWindows, Position, fired_in, harvested, joined


logger = logging.getLogger(__name__)

_BUILDING = ".building"
_TOKENS_AT_ONCE = 2**15  # whose pairs are looked at together
_ENTRIES_AT_ONCE = 2**24  # windows x latents, of the same


class Tree(Protocol):
    """What finds parents and children; see `EdgeSums`."""

    def add(self, pairs: LatentPairs) -> None: ...

    def reduce(self) -> None: ...

    def parents(self) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class IndexSizes:
    """How much an index keeps of each latent.

    Args:
        top_contexts (`int`, *optional*, defaults to 16): Contexts in which it fires most.
        quantiles (`int`, *optional*, defaults to 5): Parts of equal size into which its firings are cut, by strength.
        quantile_contexts (`int`, *optional*, defaults to 4): Contexts from each of them, at most.
        sampled_contexts (`int`, *optional*, defaults to 32): Random contexts from which those are chosen.
        context_tokens (`int`, *optional*, defaults to 32): Tokens shown of a context.
        tokens_of_vocabulary (`int`, *optional*, defaults to 10): Promoted, and suppressed, tokens.
        neighbours (`int`, *optional*, defaults to 8): Latents with similar decoder rows.
        cofiring (`int`, *optional*, defaults to 8): Latents that fire with it.
        cofiring_tokens (`int`, *optional*, defaults to 128): Of its tokens, sampled to find those.
    """

    top_contexts: int = 16
    quantiles: int = 5
    quantile_contexts: int = 4
    sampled_contexts: int = 32
    context_tokens: int = 32
    tokens_of_vocabulary: int = 10
    neighbours: int = 8
    cofiring: int = 8
    cofiring_tokens: int = 128

    def check(self) -> None:
        """Raises `ValueError` for a size below 1, or 0 where nothing of a kind may be kept."""
        for name, value in asdict(self).items():
            least = 0 if name in ("tokens_of_vocabulary", "neighbours", "cofiring", "quantile_contexts") else 1
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")


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
    tree: Tree | None = None,
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
        tree (*optional*): Finds parents and children of latents, for example `EdgeSums(sae)`.
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
    if output_dir is None and folder is None:
        raise ValueError("Name an `output_dir`: this SAE was not loaded from a folder.")
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
        "base_model": name or getattr(lm, "name_or_path", "") or type(lm).__name__,
        "tokenizer": getattr(tokenizer, "name_or_path", ""),
        "hookpoint": place,
        "dataset": asdict(dataset) if isinstance(dataset, DatasetConfig) else None,
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
    found = _Pass(sae, sizes, context_length, seed, tree)
    states = _States(target / _BUILDING, about, rank, world)
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
    folder = Path(sae.name_or_path or "/nowhere").expanduser()
    return sae, folder if (folder / "config.json").is_file() else None


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


class _Pass:
    """What one process knows of every latent."""

    def __init__(self, sae: SAEModel, sizes: IndexSizes, context_length: int, seed: int, tree: Tree | None):
        latents, device = sae.config.num_latents, sae.W_enc.device
        width = min(sizes.context_tokens, context_length)
        self.sums = LatentSums(latents, device)
        self.contexts = Contexts(latents, sizes.top_contexts, sizes.sampled_contexts, width, seed, device)
        self.cofiring = TokenSample(latents, sizes.cofiring_tokens, seed, device)
        self.tree, self.num_latents = tree, latents

    def batches_at_once(self, windows: int, context_length: int) -> int:
        """Batches in a chunk."""
        few = min(_TOKENS_AT_ONCE // context_length, _ENTRIES_AT_ONCE // self.num_latents)
        return max(1, few // windows)

    def add(self, chunk: list[Fired]) -> None:
        """Look at some batches."""
        for batch in chunk:
            self.sums.add_first(batch.first, batch.first_counts)
            if self.tree is not None:
                self.tree.add(batch.pairs)
        firings = joined([batch.firings for batch in chunk])
        self.sums.add(firings.cols, firings.values, sum(batch.tokens for batch in chunk))
        self.contexts.add(firings)
        self.cofiring.add(firings)

    def _parts(self) -> dict[str, Any]:
        parts = {"sums": self.sums, "contexts": self.contexts, "cofiring": self.cofiring}
        return parts | ({"tree": self.tree} if hasattr(self.tree, "load_state_dict") else {})

    @property
    def resumable(self) -> bool:
        """Whether all of it can be saved."""
        return self.tree is None or hasattr(self.tree, "load_state_dict")

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        parts = self._parts().items()
        return {f"{part}.{name}": tensor for part, held in parts for name, tensor in held.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the place of a state."""
        for part, held in self._parts().items():
            held.load_state_dict(_of(state, part))

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add another process's; a tree sums over processes by itself."""
        for part, held in self._parts().items():
            if part != "tree":
                held.merge(_of(state, part))


def _of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


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


class _States:
    """The saved states of an unfinished index."""

    def __init__(self, folder: Path, about: dict[str, Any], rank: int, world: int):
        self.folder, self.about, self.rank, self.world = folder, about, rank, world

    def save(self, found: _Pass, position: Position) -> None:
        """Save this process's."""
        if found.resumable or self.world > 1:
            save_state(state_file(self.folder, self.rank, self.world), self.about, position, found.state_dict())

    def load(self, found: _Pass) -> Position | None:
        """Put this process's state into `found`; where the text goes on, or `None` where there is none."""
        saved = load_state(state_file(self.folder, self.rank, self.world), self.about) if found.resumable else None
        if saved is None:
            return None
        found.load_state_dict(saved[1])
        logger.info("Continuing the index in %s at token %d.", self.folder.parent, saved[0].tokens)
        return saved[0]

    def of(self, rank: int) -> dict[str, Tensor]:
        """The state of another process, which has finished."""
        saved = load_state(state_file(self.folder, rank, self.world), self.about)
        if saved is None:
            raise ValueError(
                f"The state of process {rank} is not in {self.folder}. All processes need one folder for the index."
            )
        return saved[1]


def _write(
    target: Path,
    about: dict[str, Any],
    sae: SAEModel,
    lm: nn.Module,
    found: _Pass,
    sizes: IndexSizes,
    tree: Tree | None,
) -> None:
    columns, why = latent_columns(sae, lm, found.sums, found.contexts, found.cofiring, sizes, tree)
    about = about | {"tokens": int(found.sums.tokens), "logits": why or "final norm's gain included, biases left out"}
    contexts = context_tables(found.contexts, about["context_length"], sizes.quantiles, sizes.quantile_contexts)
    write_index(target, about, columns, contexts)
