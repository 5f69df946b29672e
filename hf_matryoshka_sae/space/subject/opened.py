"""One open SAE: rankings of its latents, prunings of it, and what each is worth on held-out text.

Many visitors look at the same SAE: it is not changed, and what was measured is kept.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from ...activations import TokenBatch
from ...activations.sentences import SENTENCE_EMBEDDING
from ...evaluation import HeldOut
from ...features import FeatureIndex
from ...features.tree.picture import nested_picture
from ...features.tree.sums import LEAST, THRESHOLD
from ...features.tree.tree import LatentTree
from ...models import SAEModel
from ...progressive import (
    LatentStatistics,
    latent_statistics,
    sort_latents,
)
from ...progressive.ranking import sorting_order
from ...progressive.statistics import STATISTICS_FILE
from ..limits import UNREACHABLE, wanted
from ..looks.labels import Labels
from .indexes import FoundIndex, find_index
from .lanes import NoLongerWantedError
from .prunings import Pruning, at_k, cut, worth
from .reader import Reader
from .texts import coded


if TYPE_CHECKING:
    from .library import Library


RANKINGS = ("trained", "energy", "frequency", "attribution")
FIGURES = ("width", "l0", "fvu", "recaptured_zero", "ce", "kl", "size_mb", "recaptured_mean", "dead", "tokens")
_OF_INDEX = ("columns", "candidates", "tree", "picture")
_COUNTED = ("topk", "batch_topk")


class Watched(HeldOut):
    """A language model with text, whose run ends where nobody wants its result any more."""

    def share(self) -> Iterator[TokenBatch]:
        """Yield the batches as long as the result is wanted."""
        for batch in super().share():
            if not wanted():
                raise NoLongerWantedError
            yield batch


class Opened:
    """An SAE with what it is shown with. Made by [`Library.open`].

    Args:
        source (`str`), place (`str`): As the visitor named it, and which of its SAEs.
        where (`str`), subfolder (`str`): Folder or id on the Hub, and the folder in it.
        sae ([`SAEModel`]): In `eval` mode.
        reader ([`Reader`]): Its language model, loaded when it is run for the first time.
        library ([`Library`]): That it belongs to.
        siblings (`list[str]`): Places of all SAEs of its source, its own among them.
        revision (`str`, *optional*): Commit of a repository.
    """

    def __init__(
        self,
        source: str,
        place: str,
        where: str,
        subfolder: str,
        sae: SAEModel,
        reader: Reader,
        library: "Library",
        siblings: list[str],
        revision: str | None = None,
    ) -> None:
        self.source, self.place, self.where, self.subfolder = source, place, where, subfolder
        self.sae, self.reader, self.library, self.siblings = sae, reader, library, siblings
        self.revision = revision
        self._data: HeldOut | None = None
        self.num_latents: int = sae.config.num_latents
        self._kept: dict[Any, Any] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """Take a new lock that nobody holds."""
        # Held by what needs no language model, which does not wait for one; nothing that takes a lane runs under it.
        self._reading = threading.RLock()

    @contextmanager
    def running(self, lane: str) -> Iterator[HeldOut]:
        """Hold a lane in which the language model runs; gives the model with the text.

        Args:
            lane (`str`): One of `LANES`.

        Raises:
            `ValueError`: if too many wait for it.
            [`NoLongerWantedError`]: if nobody wants the result any more.
        """
        with self.library.lanes[lane].turn(wanted):
            yield Watched(**vars(self.data))

    @property
    def data(self) -> HeldOut:
        """Its language model with the held-out text, at its hookpoint; loaded by the first who asks.

        Raises:
            `ValueError`: if it reads embeddings of whole texts.
        """
        self.load()
        if self._data is None:
            raise ValueError(
                "This SAE reads embeddings of whole texts: nothing happens token by token, and no text is continued. "
                "Search texts with it on the tab “Texts”."
            )
        return self._data

    @property
    def of_texts(self) -> bool:
        """Whether it reads embeddings of whole texts."""
        return self.sae.config.hookpoint == SENTENCE_EMBEDDING

    def load(self) -> None:
        """Load the language model, unless it is there; raises `ValueError` as [`Library.heldout`]."""
        if self.of_texts:
            self.reader.encoder()
        elif self._data is None:
            data = self.library.heldout(self)
            self.sae.to(data.device)
            self._data = data

    def to(self, device: str) -> None:
        """Move the SAE and, if it is there, the language model."""
        self.sae.to(device)
        if self._data is not None:
            self._data.model.to(device)

    @property
    def tokenizer(self) -> Any:
        """Of the language model."""
        return self.reader.tokenizer

    @property
    def hookpoint(self) -> str:
        """Where it reads."""
        return self.sae.config.hookpoint if self._data is None else self._data.hookpoint

    @property
    def tokens(self) -> int:
        """How many tokens it is measured on; before the text is there, for how many it is asked."""
        return self.library.tokens if self._data is None else self._data.tokens

    @property
    def counts(self) -> bool:
        """Whether k, the number of latents per token, can be chosen."""
        return self.sae.config.activation_name in _COUNTED and getattr(self.sae.config, "group_size", None) is None

    @cached_property
    def _found(self) -> FoundIndex:
        return find_index(self)

    @property
    def index(self) -> FeatureIndex | None:
        """Its feature index, if there is one of these weights that can be read."""
        return self._found.index

    @property
    def labels(self) -> Labels:
        """What to write beside its latents."""
        return self._found.labels

    @property
    def index_problem(self) -> str:
        """What is wrong with the index that is there; empty where there is none, or nothing is wrong."""
        return self._found.problem

    def forget_index(self) -> None:
        """Look for the index anew: one was built."""
        self.__dict__.pop("_found", None)
        for key in list(self._kept):
            if (key if isinstance(key, str) else key[0]) in _OF_INDEX:
                self._kept.pop(key, None)

    def require_index(self) -> FeatureIndex:
        """The index.

        Raises:
            `ValueError`: if there is none.
        """
        if self.index is None:
            raise ValueError(
                f"{self.index_problem or 'This SAE has no feature index yet.'} Build it under Explore, or with "
                f"`matryoshka-sae index {self.source}`, and open the SAE again."
            )
        return self.index

    def tree(self, threshold: float = THRESHOLD) -> LatentTree:
        """Parents and children of its latents at a least score of a parent; raises `ValueError` without an index."""
        index = self.require_index()
        whole = self._once(("tree", LEAST), lambda: index.tree(list(self.sae.prefix_widths), LEAST))
        return self._once(("tree", threshold), lambda: whole.at(threshold), most=8)

    def picture(self, threshold: float, most: int) -> str:
        """The tree as SVG, of at most so many latents; raises `ValueError` without an index, or for a threshold."""
        tree = self.tree(threshold)
        key = ("picture", threshold, most)
        return self._once(key, lambda: nested_picture(tree, self.labels, most=most), most=8)

    def could_refine(self) -> dict[int, list[tuple[int, float]]]:
        """For each latent those that have it among the candidates for their parent, highest score first."""
        index = self.require_index()
        return self._once("candidates", lambda: _below(index))

    def columns(self) -> dict[str, np.ndarray]:
        """What the index knows of every latent, as arrays `(F,)`; raises `ValueError` without an index."""
        index = self.require_index()
        return self._once("columns", lambda: _arrays(index))

    def texts(self, texts: tuple[str, ...]) -> tuple[Any, Any, dict[str, Any]]:
        """Texts as its latents code them, see [`coded`]; the last few are kept."""
        return self._once(("texts", texts), lambda: coded(self, texts), most=4)

    # Rankings

    def check(self, pruning: Pruning) -> Pruning:
        """A pruning with its defaults filled in.

        Raises:
            `ValueError`: for a ranking, width or k that there is not.
        """
        width = pruning.width or self.num_latents
        if pruning.ranking not in RANKINGS:
            raise ValueError(f"Rankings are {', '.join(RANKINGS)}; got '{pruning.ranking}'.")
        if pruning.ranking == "attribution" and not self.reader.has_loss:
            raise ValueError("Attribution needs a language model that predicts tokens; take energy or frequency.")
        if not 1 <= width <= self.num_latents:
            raise ValueError(f"The width must lie between 1 and {self.num_latents}, got {width}.")
        k = pruning.k if self.counts else None
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1 latent per token, got {k}.")
        if k is None or k == self.sae.config.k:
            return Pruning(pruning.ranking, int(width))
        return Pruning(pruning.ranking, int(width), min(int(k), int(width)))

    def statistics(self) -> LatentStatistics:
        """What each latent does: as saved beside the SAE, else measured on the held-out text."""
        if self._saved_statistics is not None:
            return self._saved_statistics
        return self._measured_once(
            "statistics", lambda data: latent_statistics(self.sae, data, attribution=data.has_loss)
        )

    @cached_property
    def _saved_statistics(self) -> LatentStatistics | None:
        """Those beside the SAE, if they are of these weights and complete."""
        try:
            statistics = LatentStatistics.load(self._file(STATISTICS_FILE))
            statistics.check(self.sae)
        except (ValueError, *UNREACHABLE):
            return None
        return None if statistics.attribution is None and self.reader.has_loss else statistics

    def _file(self, name: str) -> Path:
        """A file beside the SAE, downloaded if it is on the Hub."""
        if Path(self.where).is_dir():
            return Path(self.where) / self.subfolder / name
        place = f"{self.subfolder}/{name}" if self.subfolder else name
        return Path(hf_hub_download(self.where, place, revision=self.revision))

    def places(self, latent: int) -> dict[str, int]:
        """A latent's place in each ranking that needs no measuring first; a width above it holds the latent."""
        known = self._saved_statistics is not None or "statistics" in self._kept
        rankings = RANKINGS if known else RANKINGS[:1]
        if not self.reader.has_loss:
            rankings = tuple(ranking for ranking in rankings if ranking != "attribution")
        return {ranking: int((self.order(ranking) == latent).nonzero()) for ranking in rankings}

    def order(self, ranking: str) -> Tensor:
        """The latents `(F,)` in the order of a ranking, most important first."""
        if ranking == "trained":
            return torch.arange(self.num_latents)
        statistics = self.statistics()
        return self._once(("order", ranking), lambda: sorting_order(self.sae, ranking, statistics))

    def ranked(self, ranking: str) -> SAEModel:
        """The SAE with its latents in the order of a ranking."""
        if ranking == "trained":
            return self.sae
        order = self.order(ranking)
        return self._once(("ranked", ranking), lambda: sort_latents(self.sae, order=order))

    # Prunings

    def pruned(self, pruning: Pruning) -> SAEModel:
        """The SAE that a pruning leaves."""
        ranked, width, k = self.ranked(pruning.ranking), pruning.width, pruning.k
        if k is not None and ranked.config.activation_name == "batch_topk":
            return self._measured_once(("pruned", pruning), lambda data: at_k(ranked, data, width, k), most=8)
        return self._once(("pruned", pruning), lambda: cut(ranked, width, k), most=8)

    def measured(self, pruning: Pruning) -> dict[str, Any]:
        """What a pruning is worth: the figures that `matryoshka-sae evaluate` gives for the SAE it leaves."""
        sae = self.pruned(pruning)
        return self._measured_once(("measured", pruning), lambda data: worth(sae, data))

    def figures(self, pruning: Pruning) -> dict[str, Any]:
        """The figures of a pruning in plain values."""
        row = self.measured(pruning)
        known = {name: row.get(name) for name in FIGURES}
        rsa = (row.get("rsa") or {}).get("spearman")
        return {**known, "rsa": rsa, "k": pruning.k, "ranking": pruning.ranking}

    def compute(self, kind: str, pruning: Pruning) -> Any:
        """Measure what of this SAE needs a language model, as values that any process can keep.

        Args:
            kind (`str`): `measured` (figures of a pruning), `statistics` (of all latents, for rankings) or
                `pruned` (the SAE that it leaves).
            pruning ([`Pruning`]): Which.
        """
        if kind == "measured":
            return self.measured(pruning)
        if kind == "statistics":
            return self.statistics()
        return self.pruned(pruning).to("cpu") if os.environ.get("SPACES_ZERO_GPU") else self.pruned(pruning)

    def has(self, kind: str, pruning: Pruning) -> bool:
        """Whether that is there already, or needs no language model."""
        if kind == "statistics":
            return self._saved_statistics is not None or "statistics" in self._kept
        if kind == "pruned" and pruning.k is None:
            return True
        return _key(kind, pruning) in self._kept

    def keep(self, kind: str, pruning: Pruning, value: Any) -> None:
        """Keep it, wherever it was computed."""
        self._kept.setdefault(_key(kind, pruning), value)

    def _measured_once(self, key: Any, make: Callable[[HeldOut], Any], most: int | None = None) -> Any:
        """What `make` gives with the language model, in the lane of what is measured."""
        if key in self._kept:
            return self._kept[key]
        with self.running("measure") as data:
            return self._once(key, lambda: make(data), most, nullcontext())

    def _once(self, key: Any, make: Callable[[], Any], most: int | None = None, lock: Any = None) -> Any:
        """What `make` gives, made by the first who asks; at most `most` of a kind are kept."""
        if key in self._kept:
            return self._kept[key]
        with lock or self._reading:
            if key not in self._kept:
                made = make()
                of_kind = [other for other in list(self._kept) if isinstance(other, tuple) and other[0] == key[0]]
                if most is not None and len(of_kind) >= most:
                    self._kept.pop(of_kind[0], None)
                self._kept[key] = made
                return made
            return self._kept[key]


def _key(kind: str, pruning: Pruning) -> Any:
    return kind if kind == "statistics" else (kind, pruning)


def _below(index: FeatureIndex) -> dict[int, list[tuple[int, float]]]:
    below: dict[int, list[tuple[int, float]]] = {}
    if "candidates" not in index.columns:
        return below  # an index of an earlier version
    table = index.table(["candidates", "candidate_scores"])
    for latent, (parents, scores) in enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True)):
        for parent, score in zip(parents or [], scores or [], strict=True):
            below.setdefault(parent, []).append((latent, score))
    return {parent: sorted(ones, key=lambda one: -one[1]) for parent, ones in below.items()}


def _arrays(index: FeatureIndex) -> dict[str, np.ndarray]:
    table = index.table(["latent", "frequency", "mean_square", "max"])
    return {name: table[name].to_numpy() for name in table.column_names}
