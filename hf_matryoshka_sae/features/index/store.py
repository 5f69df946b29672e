"""A feature index, opened at once and read a latent at a time."""

import os
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ...common.files import write_json
from ...models import SAEModel
from ...models.configuration_sae import nearest
from ..labels import LABELS, read_labels
from ..sizes import FOLDER
from ..telling import Contexts, Spell, speller
from .about import read_about
from .layout import (
    CONTEXTS,
    INDEX,
    LATENT_SCHEMA,
    LATENTS,
    LATENTS_PER_GROUP,
    SCALARS,
    TOP,
    Context,
    Feature,
    fingerprints,
    is_hub_id,
)
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
            locate = _in_folder(folder)
        else:
            locate = _on_hub(str(source), subfolder, revision, token)
        about = read_about(locate(INDEX), source)
        labels = locate(LABELS) if local.is_dir() or about.get("labels") else None
        labels = read_labels(labels) if labels is not None and labels.is_file() else {}
        return cls(about, _checked(locate, source), None, labels, speller(about.get("base_model"), tokenizer))

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
        # Which entries of a relation stay follows from the latents it names.
        needed = names if self._places is None else list(dict.fromkeys([*names, *_deciding(names)]))
        table = self._read(lambda: self._latents.read(columns=needed).select(needed))
        if self._places is None:
            return table
        return self._moved_table(table.take(self._places), names)

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
        return feature if self._places is None else self._moved(feature, latent)

    def contexts(self, latent: int) -> Contexts:
        """Return only the contexts of a latent, a list that prints as text; raise `ValueError` as [`feature`] does."""
        place = self._place(latent)
        group = place // LATENTS_PER_GROUP[CONTEXTS]
        table = self._read(lambda: self._contexts.read_row_group(group))
        rows = table.filter(pc.equal(table["latent"], place)).drop_columns("latent").to_pylist()
        arrays = {"token_ids": np.int32, "activations": np.float32}
        rows = (row | {key: np.array(row[key], kind) for key, kind in arrays.items()} for row in rows)
        return Contexts((Context(**row, spell=self.spell) for row in rows), self.spell)

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
            )
        }
        del values["fingerprint"]
        start, counts = values.pop("histogram_start"), np.array(values.pop("histogram"), np.int64)
        histogram = (bin_edges().numpy()[start : start + len(counts) + 1], counts)
        quantiles = dict(zip(self.about["probabilities"], values.pop("quantiles"), strict=False))
        parent = values.pop("parent")
        if parent < 0:
            parent = values["parent_score"] = None
        children = values.pop("children") or []
        return Feature(**values, **pairs, quantiles=quantiles, histogram=histogram, parent=parent, children=children)

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

    @cached_property
    def _numbers(self) -> np.ndarray:
        """New number of each latent in the files, -1 where it is gone; the last entry maps -1 to -1."""
        numbers = np.full(self.about["num_latents"] + 1, -1)
        numbers[self._places] = np.arange(len(self._places))
        return numbers

    def _moved_table(self, table: pa.Table, names: list[str]) -> pa.Table:
        """Return the columns `names` with latents renumbered and without relations to those that are gone."""
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        moved = {}
        for name in names:
            if name in RELATIONS:
                moved[name] = self._moved_lists(columns[RELATIONS[name]], columns[name], renumber=name in _OF_LATENTS)
            elif name in _OF_LATENTS:
                moved[name] = pa.array(self._numbers[columns[name].to_numpy()], pa.int32())
            elif name == "parent_score":
                there = self._numbers[columns["parent"].to_numpy()] >= 0
                moved[name] = pa.array(np.where(there, columns[name].to_numpy(), 0), pa.float32())
            else:
                moved[name] = columns[name]
        return pa.table([moved[name] for name in names], names=names)

    def _moved_lists(self, latents: pa.ListArray, values: pa.ListArray, renumber: bool) -> pa.ListArray:
        """Return lists of latents, or of values that belong to latents, without the latents that are gone."""
        numbers = self._numbers[latents.flatten().to_numpy()]
        there = numbers >= 0
        rows = np.repeat(np.arange(len(latents)), latents.value_lengths().to_numpy())
        sizes = np.bincount(rows[there], minlength=len(latents))
        entries = numbers if renumber else values.flatten().to_numpy()
        offsets = pa.array(np.concatenate([[0], sizes.cumsum()]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(entries[there], values.type.value_type))

    def _moved(self, feature: Feature, latent: int) -> Feature:
        def there(pairs: list[tuple[int, float]]) -> list[tuple[int, float]]:
            moved = [(int(self._numbers[other]), value) for other, value in pairs]
            return [pair for pair in moved if pair[0] >= 0]

        feature.latent = latent
        feature.neighbours, feature.cofiring = there(feature.neighbours), there(feature.cofiring)
        feature.children = [child for child, _ in there([(child, 0.0) for child in feature.children])]
        if feature.parent is not None:
            feature.parent = int(self._numbers[feature.parent])
            if feature.parent < 0:
                feature.parent = feature.parent_score = None
        return feature


# Columns of lists, and for each the column of latents that decides which entries stay when latents are removed
RELATIONS = {
    "neighbours": "neighbours",
    "neighbour_cosines": "neighbours",
    "cofiring": "cofiring",
    "cofiring_rates": "cofiring",
    "children": "children",
}
_OF_LATENTS = ("latent", "parent", "neighbours", "cofiring", "children")


def _deciding(columns: Iterable[str]) -> list[str]:
    deciding = RELATIONS | {"parent_score": "parent"}
    return [deciding[name] for name in columns if name in deciding]


# Reading


def _in_folder(folder: Path) -> Callable[[str], Path]:
    def locate(name: str) -> Path:
        return folder / name

    return locate


def _on_hub(repo: str, subfolder: str, revision: str | None, token: str | None) -> Callable[[str], Path]:
    place = "/".join(part for part in (subfolder.strip("/"), FOLDER) if part)

    def locate(name: str) -> Path:
        try:
            return Path(hf_hub_download(repo, f"{place}/{name}", revision=revision, token=token))
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"'{repo}' is no folder here, and its feature index cannot be fetched from the Hub: {error}"
            ) from error
        except EntryNotFoundError:
            return Path(place) / name  # whoever reads it reports it missing
        except OSError as error:  # no such repository or revision, no right to read it, no answer
            raise ValueError(
                f"'{repo}' is no folder here, and cannot be read from the Hub: {error} Check the name, the revision "
                "and the token."
            ) from error

    return locate


def _checked(locate: Callable[[str], Path], source: Any) -> Callable[[str, int], Path]:
    """Return `locate` with a check of the file's size."""

    def check(name: str, size: int) -> Path:
        path = locate(name)
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(
                f"The feature index of {source} is damaged: {name} is missing or not {size} bytes long. Build or "
                "download it again."
            )
        return path

    return check


def _opened(path: Path) -> pq.ParquetFile:
    return _read(lambda: pq.ParquetFile(path, memory_map=True, page_checksum_verification=True))


def _read(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"The feature index is damaged ({error}). Build or download it again.") from error
