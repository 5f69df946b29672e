"""A feature index, opened at once and read a latent at a time."""

import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ...common.files import write_json
from ...models import SAEModel
from ...models.configuration_sae import nearest
from ..bands import EDGES, Band
from ..labels import LABELS, read_labels
from ..sizes import FOLDER
from ..telling import Contexts, Spell, speller
from ..tree.sums import THRESHOLD
from ..tree.tree import LatentTree
from .about import checked, in_folder, on_hub, read_about
from .layout import (
    CONTEXTS,
    INDEX,
    LATENT_SCHEMA,
    LATENTS,
    LATENTS_PER_GROUP,
    SCALARS,
    SHOWCASE,
    SHOWCASE_VERSION,
    TOP,
    Context,
    Feature,
    fingerprints,
    is_hub_id,
)
from .renumbering import Renumbering, needed_columns
from .sums import bin_edges


class FeatureIndex:
    """An index of an SAE's latents; nothing but `index.json` is read before it is needed.

    Open one with [`FeatureIndex.open`]; `len(index)` is the number of latents.

    Attributes:
        about (`dict[str, Any]`): Content of `index.json`: `base_model`, `hookpoint`, `dataset`, `tokens`,
            `context_length`, `weights`, `versions`, ...
        labels (`dict[int, str]`): What latents are called, by the id each had before any sorting or pruning
            (`latent_ids` of the SAE); add others with `index.labels |= read_labels(path)`, keep them with
            [`save_labels`].
        spell (`Callable`): From token ids to their texts, by the tokenizer of `base_model`, which is loaded when it is
            first needed.
    """

    def __init__(
        self,
        about: dict[str, Any],
        locate: Callable[[str, int], Path],
        places: np.ndarray | None = None,
        labels: dict[int, str] | None = None,
        spell: Spell | None = None,
    ) -> None:
        self.about = about
        self.labels = {} if labels is None else labels
        self.spell = spell or speller(about.get("base_model"))
        self._locate = locate
        self._places = places
        self._reading = threading.Lock()

    @classmethod
    def open(
        cls,
        source: str | os.PathLike,
        subfolder: str = "",
        revision: str | None = None,
        token: str | None = None,
        tokenizer: Any = None,
    ) -> "FeatureIndex":
        """Open the index beside an SAE.

        Args:
            source (`str` or `os.PathLike`): Folder of the SAE (or of the index itself), or Hub id. From the Hub the
                contexts are downloaded when one is read for the first time.
            subfolder (`str`, *optional*): Folder of the SAE in the folder or repository.
            revision (`str`, *optional*): Branch, tag or commit.
            token (`str`, *optional*): Token of the Hub; by default the one huggingface_hub knows.
            tokenizer (*optional*): The language model's, for the texts of tokens; by default that of the model which
                the index names is loaded.

        Raises:
            `ValueError`: if there is no finished index, it is damaged, or of a newer format.
        """
        local = Path(source).expanduser()
        if not local.is_dir() and not is_hub_id(str(source)):
            what = "a file, not a folder" if local.exists() else "no folder"
            raise ValueError(f"'{source}' is {what}. Name the folder of an SAE with an index, or a Hub id.")
        if local.is_dir():
            folder = local / subfolder
            folder = folder if (folder / INDEX).is_file() and (folder / LATENTS).is_file() else folder / FOLDER
            locate = in_folder(folder)
        else:
            locate = on_hub(str(source), subfolder, revision, token)
        about = read_about(locate(INDEX), source)
        labels = locate(LABELS) if local.is_dir() or about.get("labels") else None
        labels = read_labels(labels) if labels is not None and labels.is_file() else {}
        return cls(about, checked(locate, source), None, labels, speller(about.get("base_model"), tokenizer))

    def save_labels(self, folder: str | os.PathLike) -> None:
        """Write the labels into the folder of the index, or of its SAE, where [`open`] finds them."""
        folder = Path(folder) / ("" if (Path(folder) / INDEX).is_file() else FOLDER)
        write_json(folder / LABELS, {str(key): label for key, label in self.labels.items()})

    @cached_property
    def _latents(self) -> pq.ParquetFile:
        file = _opened(self._path(LATENTS))
        if file.metadata.num_rows != self.about["num_latents"]:
            raise ValueError(
                f"The feature index is damaged: {LATENTS} has {file.metadata.num_rows} latents, {INDEX} says "
                f"{self.about['num_latents']}. Build or download it again."
            )
        return file

    @cached_property
    def columns(self) -> set[str]:
        """Names of the columns of [`table`]; an index of an earlier version has fewer."""
        return set(self._latents.schema_arrow.names)

    @cached_property
    def _renumbering(self) -> Renumbering:
        assert self._places is not None
        return Renumbering(self._places, self.about["num_latents"])

    @cached_property
    def _contexts(self) -> pq.ParquetFile:
        return _opened(self._path(CONTEXTS))

    def _read(self, action: Callable[[], Any]) -> Any:
        """Return what `action` reads; one thread at a time, as an open parquet file is not thread-safe."""
        with self._reading:
            return _read(action)

    def _path(self, name: str) -> Path:
        return self._locate(name, self.about["files"][name])

    def __len__(self) -> int:
        return self.about["num_latents"] if self._places is None else len(self._places)

    def table(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Return columns of all latents, in the SAE's order, for sorting and plotting.

        Args:
            columns (`Iterable[str]`, *optional*): Names of columns in `latents.parquet`; by default those with one
                number for each latent.

        Raises:
            `ValueError`: if there is no such column.
        """
        if isinstance(columns, str):
            raise ValueError(f"`columns` is a list of names, got {columns!r}; write [{columns!r}].")
        names = list(SCALARS) if columns is None else list(columns)
        for name in names:
            if name not in LATENT_SCHEMA.names:
                raise ValueError(f"The index has no column {name!r}.{nearest(name, LATENT_SCHEMA.names)}")
            if name not in self.columns:
                raise ValueError(
                    f"This index was built by an earlier version and has no column {name!r}. Build it again with "
                    "`matryoshka-sae index`."
                )
        # Which entries of a relation stay follows from the latents it names.
        needed = names if self._places is None else needed_columns(names)
        table = self._read(lambda: self._latents.read(columns=needed).select(needed))
        if self._places is None:
            return table
        return self._renumbering.table(table.take(self._places), names)

    def feature(self, latent: int, contexts: bool = True) -> Feature:
        """Return all that the index holds on a latent.

        Args:
            latent (`int`): Position of the latent in the SAE.
            contexts (`bool`, *optional*, defaults to `True`): Whether to read its contexts too.

        Raises:
            `ValueError`: if there is no such latent, or the files are damaged.
        """
        place = self._place(latent)
        feature = self._feature(place)
        feature.label, feature.spell = self.labels.get(feature.latent_id), self.spell
        if contexts:
            feature.contexts = self.contexts(latent)
        return feature if self._places is None else self._renumbering.feature(feature, latent)

    def contexts(self, latent: int) -> Contexts:
        """Return only the contexts of a latent, a list that prints as text; raise `ValueError` as [`feature`] does."""
        place = self._place(latent)
        group = place // LATENTS_PER_GROUP[CONTEXTS]
        table = self._read(lambda: self._contexts.read_row_group(group))
        rows = table.filter(pc.equal(table["latent"], place)).drop_columns("latent").to_pylist()
        arrays = {"token_ids": np.int32, "activations": np.float32}
        rows = (row | {key: np.array(row[key], kind) for key, kind in arrays.items()} for row in rows)
        return Contexts((Context(**row, spell=self.spell) for row in rows), self.spell)

    def showcase(self) -> dict[str, Any] | None:
        """Return what the SAE is worth at twelve widths and a sample text, see [`showcase`].

        Returns:
            `dict` or `None`: `None` where the index was built without, or is of a part of the SAE or of another order
            of its latents by [`for_sae`].
        """
        if SHOWCASE not in self.about["files"] or not self._is_whole:
            return None
        content = self._read(lambda: json.loads(self._path(SHOWCASE).read_text(encoding="utf-8")))
        return content if content.get("format_version") == SHOWCASE_VERSION else None

    @property
    def _is_whole(self) -> bool:
        """Whether all latents are there, in the order of the files."""
        return self._places is None or np.array_equal(self._places, np.arange(self.about["num_latents"]))

    def tree(self, widths: Sequence[int] | None = None, threshold: float = THRESHOLD) -> LatentTree:
        """Return which latents refine which.

        Args:
            widths (`Sequence[int]`, *optional*): Prefix widths of the SAE, which are the levels of the tree; by
                default those of the SAE that the index was built of.
            threshold (`float`, *optional*, defaults to 0.6): Least score of a parent. An index of an earlier version
                knows none below 0.6.

        Raises:
            `ValueError`: if the widths are not known, or the threshold is out of range.
        """
        widths = [width for width in widths or self.about.get("prefix_widths") or [] if width < len(self)]
        later = [name for name in ("candidates", "candidate_scores") if name in self.columns]
        table = self.table(["parent", "parent_score", "frequency", "max", *later])
        level = np.searchsorted(np.array(widths), np.arange(len(self)), side="right")
        parent, score = table["parent"].to_numpy(), table["parent_score"].to_numpy()
        if later:
            parent, score = _best(table, level)
        parent, score = (torch.tensor(column) for column in (parent.astype(np.int64), score.astype(np.float64)))
        numbers = (torch.tensor(table[name].to_numpy()).double() for name in ("frequency", "max"))
        tree = LatentTree(torch.tensor(level), parent, score, *numbers, 0.0, self.about["tokens"], [0])
        return tree.at(threshold)

    def peak_tokens(self) -> list[list[int]]:
        """Return for each latent the token ids at the peaks of its top contexts, strongest first.

        Reads the contexts of all latents.
        """
        peaks: list[list[int]] = [[] for _ in range(self.about["num_latents"])]
        columns = ["latent", "kind", "token_ids", "peak"]
        for group in range(self._contexts.num_row_groups):
            table = self._read(lambda group=group: self._contexts.read_row_group(group, columns=columns))
            table = table.filter(pc.equal(table["kind"], TOP)).combine_chunks()
            if not len(table):
                continue
            ids = table["token_ids"].chunk(0)
            places = ids.offsets.to_numpy()[:-1] + table["peak"].to_numpy()
            tokens = ids.values.to_numpy()[places]
            for latent, token in zip(table["latent"].to_pylist(), tokens.tolist(), strict=True):
                peaks[latent].append(token)
        return peaks if self._places is None else [peaks[place] for place in self._places]

    def _place(self, latent: int) -> int:
        """Return the row of a latent in the files."""
        if isinstance(latent, bool) or not isinstance(latent, Integral) or not 0 <= latent < len(self):
            raise ValueError(f"Latents are numbered 0 to {len(self) - 1}, got {latent!r}.")
        return int(latent) if self._places is None else int(self._places[latent])

    def _feature(self, place: int) -> Feature:
        group, row = divmod(place, LATENTS_PER_GROUP[LATENTS])
        values = self._read(lambda: self._latents.read_row_group(group)).slice(row, 1).to_pylist()[0]
        pairs = {
            name: list(zip(values.pop(name) or [], values.pop(other) or [], strict=True))
            for name, other in (
                ("promoted", "promoted_logits"),
                ("suppressed", "suppressed_logits"),
                ("neighbours", "neighbour_cosines"),
                ("cofiring", "cofiring_rates"),
                ("candidates", "candidate_scores"),
            )
            if name in values
        }
        bands = [
            Band(*bounds, **band)
            for bounds, band in zip(pairwise(EDGES), values.pop("bands", None) or [], strict=False)
        ]
        del values["fingerprint"]
        start, counts = values.pop("histogram_start"), np.array(values.pop("histogram"), np.int64)
        histogram = (bin_edges().numpy()[start : start + len(counts) + 1], counts)
        quantiles = dict(zip(self.about["probabilities"], values.pop("quantiles"), strict=False))
        parent = values.pop("parent")
        if parent < 0:
            parent = values["parent_score"] = None
        lists = {name: values.pop(name, None) or [] for name in ("children", "own_tokens")}
        more = {"quantiles": quantiles, "histogram": histogram, "parent": parent, "bands": bands}
        return Feature(**values, **pairs, **lists, **more)

    # Another SAE with the same latents

    def check(self, sae: SAEModel) -> None:
        """Raise `ValueError` where this is no index of this SAE's latents, in this order."""
        table = self.table(["latent_id", "fingerprint"])
        ids = sae.latent_ids.cpu().numpy()
        if len(ids) != len(self):
            raise ValueError(
                f"This is an index of {len(self)} latents, the SAE has {len(ids)}. Take `index.for_sae(sae)` if it "
                "was pruned, or build its own."
            )
        if not np.array_equal(table["fingerprint"].to_numpy(), fingerprints(sae)):
            raise ValueError(
                "This is the index of another SAE, or of the same with its latents in another order: encoder rows "
                "differ. Take `index.for_sae(sae)` if it was sorted, or build its own."
            )
        if not np.array_equal(table["latent_id"].to_numpy(), ids):
            raise ValueError("The `latent_ids` of this index and of the SAE differ; build the SAE's own index.")

    def for_sae(self, sae: SAEModel) -> "FeatureIndex":
        """Return this index for the same SAE sorted, truncated or pruned: latent n is latent n of that SAE.

        Relations to latents that it lacks are left out.

        Args:
            sae ([`SAEModel`]): The sorted, truncated or pruned SAE.

        Raises:
            `ValueError`: if the SAE has latents that are not in the index.
        """
        table = self.table(["latent_id", "fingerprint"])
        places = {key: place for place, key in enumerate(table["latent_id"].to_pylist())}
        rows = [places.get(key, -1) for key in sae.latent_ids.tolist()]
        missing = rows.count(-1)
        places_in_file = np.array(rows)
        if not missing:
            missing = int((table["fingerprint"].to_numpy()[places_in_file] != fingerprints(sae)).sum())
        if missing:
            raise ValueError(
                f"{missing} of the SAE's {len(rows)} latents are not those of this index: it is of another SAE, or "
                "they were merged or trained further. Build an index of this SAE."
            )
        places = places_in_file if self._places is None else self._places[places_in_file]
        return FeatureIndex(self.about, self._locate, places, self.labels, self.spell)


def _opened(path: Path) -> pq.ParquetFile:
    return _read(lambda: pq.ParquetFile(path, memory_map=True, page_checksum_verification=True))


def _read(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"The feature index is damaged ({error}). Build or download it again.") from error


def _best(table: pa.Table, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each latent's best candidate in a narrower level and its score; -1 and 0 where there is none."""
    lists = table["candidates"].combine_chunks()
    rows = np.repeat(np.arange(len(level)), lists.value_lengths().to_numpy())
    candidates = lists.flatten().to_numpy()
    scores = table["candidate_scores"].combine_chunks().flatten().to_numpy()
    inside = level[candidates] < level[rows]  # in an SAE that was sorted since, others may lie behind
    rows, first = np.unique(rows[inside], return_index=True)
    parent, score = np.full(len(level), -1), np.zeros(len(level))
    parent[rows], score[rows] = candidates[inside][first], scores[inside][first]
    return parent, score
