"""A feature index on disk, read a latent at a time.

    features/index.json         what the index is of; written last, so an index without it is unfinished
    features/latents.parquet    a row for each latent
    features/contexts.parquet   a row for each context, those of a latent together

Row groups hold a fixed number of latents, so that one latent is found by division and read alone.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from ..models import SAEModel
from ..models.configuration_sae import nearest
from .sums import bin_edges


FOLDER, INDEX, LATENTS, CONTEXTS = "features", "index.json", "latents.parquet", "contexts.parquet"
FORMAT = "hf_matryoshka_sae.feature_index/1"
LATENTS_PER_GROUP = {LATENTS: 256, CONTEXTS: 64}
TOP = "top"

_SCALARS = {
    "latent": pa.int32(),
    "latent_id": pa.int64(),
    "count": pa.int64(),
    "frequency": pa.float32(),
    "mean": pa.float32(),
    "mean_square": pa.float32(),
    "max": pa.float32(),
    "first_position_share": pa.float32(),
    "parent": pa.int32(),
    "parent_score": pa.float32(),
    "fingerprint": pa.int64(),
}
_LISTS = {
    "quantiles": pa.float32(),
    "histogram": pa.int32(),
    "promoted": pa.int32(),
    "promoted_logits": pa.float32(),
    "suppressed": pa.int32(),
    "suppressed_logits": pa.float32(),
    "neighbours": pa.int32(),
    "neighbour_cosines": pa.float32(),
    "cofiring": pa.int32(),
    "cofiring_rates": pa.float32(),
    "children": pa.int32(),
}
LATENT_SCHEMA = pa.schema(
    [*_SCALARS.items(), ("histogram_start", pa.int16()), *((name, pa.list_(kind)) for name, kind in _LISTS.items())]
)
CONTEXT_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("activations", pa.list_(pa.float32())),
        ("peak", pa.int16()),
        ("value", pa.float32()),
        ("window", pa.int64()),
        ("position", pa.int32()),
    ]
)


@dataclass
class Context:
    """A run of tokens around one on which a latent fires.

    Args:
        kind (`str`): `"top"`, or the number of the quantile of activation (`"0"` is the weakest) it stands for.
        token_ids (`np.ndarray` of shape `(W,)`), activations (`np.ndarray` of shape `(W,)`): Tokens, and the
            latent's activation on each.
        peak (`int`): Which of them the context is about.
        value (`float`): The activation there.
        window (`int`), position (`int`): Where that token is in the text: number of the window the language model
            saw, and place in it.
    """

    kind: str
    token_ids: np.ndarray
    activations: np.ndarray
    peak: int
    value: float
    window: int
    position: int


@dataclass
class Feature:
    """What an index knows of a latent. Latents are named by their position in the SAE.

    Args:
        latent (`int`), latent_id (`int`): Position in the SAE, and the id it had before any sorting or pruning.
        count (`int`), frequency (`float`): Tokens on which it fires, and their share.
        mean (`float`), mean_square (`float`): `E[a]` and the energy `E[a^2]`, over all tokens.
        max (`float`): Largest activation.
        first_position_share (`float`): Share of its firings that are at the first position of a context.
        quantiles (`dict[float, float]`): Of its activation where it fires, by probability.
        histogram (`tuple[np.ndarray, np.ndarray]`): Edges `(n + 1,)` and counts `(n,)` of its activations.
        promoted (`list[tuple[int, float]]`), suppressed (`list[tuple[int, float]]`): Token ids and effects on their
            logits, strongest first; empty where the model has no unembedding.
        neighbours (`list[tuple[int, float]]`): Latents with the most similar decoder rows, and the cosine.
        cofiring (`list[tuple[int, float]]`): Latents that fire most often where it fires, and how often.
        parent (`int`, *optional*), parent_score (`float`, *optional*), children (`list[int]`): In the tree of
            features between prefixes.
        contexts (`list[Context]`): Strongest first, then those of each quantile.
    """

    latent: int
    latent_id: int
    count: int
    frequency: float
    mean: float
    mean_square: float
    max: float
    first_position_share: float
    quantiles: dict[float, float]
    histogram: tuple[np.ndarray, np.ndarray]
    promoted: list[tuple[int, float]]
    suppressed: list[tuple[int, float]]
    neighbours: list[tuple[int, float]]
    cofiring: list[tuple[int, float]]
    parent: int | None
    parent_score: float | None
    children: list[int]
    contexts: list[Context] = field(default_factory=list)

    @property
    def top_contexts(self) -> list[Context]:
        """Where it fires most, strongest first."""
        return [context for context in self.contexts if context.kind == TOP]

    @property
    def quantile_contexts(self) -> dict[int, list[Context]]:
        """A random sample by quantile of activation, weakest quantile first."""
        found: dict[int, list[Context]] = {}
        for context in self.contexts:
            if context.kind != TOP:
                found.setdefault(int(context.kind), []).append(context)
        return dict(sorted(found.items()))


def fingerprints(sae: SAEModel) -> np.ndarray:
    """A number for each latent, `(F,)`, that follows from its encoder row rounded to bfloat16.

    It stays when latents are sorted, cut off or saved in a smaller type, and tells latents of other SAEs.
    """
    bits = sae.W_enc.detach().cpu().bfloat16().view(torch.int16).numpy().astype(np.uint16).astype(np.uint64)
    factors = np.arange(1, bits.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    with np.errstate(over="ignore"):
        return ((bits + np.uint64(1)) * factors).sum(1, dtype=np.uint64).view(np.int64)


class FeatureIndex:
    """An index of an SAE's latents; nothing but `index.json` is read before it is needed.

    Open one with [`FeatureIndex.open`]; `len(index)` is the number of latents.

    Attributes:
        about (`dict[str, Any]`): What the index is of: `base_model`, `hookpoint`, `dataset`, `tokens`,
            `context_length`, `weights`, `versions`, ...
    """

    def __init__(self, about: dict[str, Any], locate, places: np.ndarray | None = None):
        self.about = about
        self._locate = locate
        self._places = places

    @classmethod
    def open(
        cls, source: str | os.PathLike, subfolder: str = "", revision: str | None = None, token: str | None = None
    ) -> "FeatureIndex":
        """Open the index beside an SAE.

        Args:
            source (`str` or `os.PathLike`): Folder of the SAE (or of the index itself), or Hub id. From the Hub the
                contexts are downloaded when the first are asked for.
            subfolder (`str`, *optional*): Of either, where the SAE is.
            revision (`str`, *optional*), token (`str`, *optional*): As in huggingface_hub.

        Raises:
            `ValueError`: if there is no finished index, it is damaged, or of a newer format.
        """
        local = Path(source).expanduser()
        if local.is_dir():
            folder = local / subfolder
            folder = folder if (folder / INDEX).is_file() and (folder / LATENTS).is_file() else folder / FOLDER
            locate = _in_folder(folder)
        else:
            locate = _on_hub(str(source), subfolder, revision, token)
        return cls(_about(locate(INDEX), source), _checked(locate, source))

    @cached_property
    def _latents(self) -> pq.ParquetFile:
        return _opened(self._path(LATENTS))

    @cached_property
    def _contexts(self) -> pq.ParquetFile:
        return _opened(self._path(CONTEXTS))

    def _path(self, name: str) -> Path:
        return self._locate(name, self.about["files"][name])

    def __len__(self) -> int:
        return self.about["num_latents"] if self._places is None else len(self._places)

    def table(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Columns of all latents, in the SAE's order, for sorting and plotting.

        Args:
            columns (`Iterable[str]`, *optional*): Of `latents.parquet`; by default those with one number a latent.

        Raises:
            `ValueError`: for a column there is not.
        """
        wanted = list(_SCALARS) if columns is None else list(columns)
        for name in wanted:
            if name not in LATENT_SCHEMA.names:
                raise ValueError(f"The index has no column {name!r}.{nearest(name, LATENT_SCHEMA.names)}")
        table = _read(lambda: self._latents.read(columns=wanted))
        if self._places is None:
            return table
        table = table.take(self._places)
        for name in ("latent", "parent"):
            if name in wanted:
                values = self._renumbered(table[name].to_numpy())
                table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.int32()))
        return table

    def feature(self, latent: int, contexts: bool = True) -> Feature:
        """All that is known of a latent.

        Args:
            latent (`int`): Its position in the SAE.
            contexts (`bool`, *optional*, defaults to `True`): Read its contexts too.

        Raises:
            `ValueError`: if there is no such latent, or the files are damaged.
        """
        if not 0 <= latent < len(self):
            raise ValueError(f"Latents are numbered 0 to {len(self) - 1}, got {latent}.")
        place = latent if self._places is None else int(self._places[latent])
        feature = self._feature(place)
        if contexts:
            feature.contexts = self.contexts(latent)
        return feature if self._places is None else self._moved(feature, latent)

    def contexts(self, latent: int) -> list[Context]:
        """The contexts of a latent alone."""
        place = latent if self._places is None else int(self._places[latent])
        group = place // LATENTS_PER_GROUP[CONTEXTS]
        table = _read(lambda: self._contexts.read_row_group(group))
        rows = table.filter(pc.equal(table["latent"], place)).drop_columns("latent").to_pylist()
        return [
            Context(
                **row
                | {
                    "token_ids": np.array(row["token_ids"], np.int32),
                    "activations": np.array(row["activations"], np.float32),
                }
            )
            for row in rows
        ]

    def _feature(self, place: int) -> Feature:
        group, row = divmod(place, LATENTS_PER_GROUP[LATENTS])
        found = _read(lambda: self._latents.read_row_group(group)).slice(row, 1).to_pylist()[0]
        pairs = {
            name: list(zip(found.pop(name) or [], found.pop(other) or [], strict=True))
            for name, other in (
                ("promoted", "promoted_logits"),
                ("suppressed", "suppressed_logits"),
                ("neighbours", "neighbour_cosines"),
                ("cofiring", "cofiring_rates"),
            )
        }
        del found["fingerprint"]
        start, counts = found.pop("histogram_start"), np.array(found.pop("histogram"), np.int64)
        histogram = (bin_edges().numpy()[start : start + len(counts) + 1], counts)
        quantiles = dict(zip(self.about["probabilities"], found.pop("quantiles"), strict=False))
        parent = found.pop("parent")
        if parent < 0:
            parent = found["parent_score"] = None
        children = found.pop("children") or []
        return Feature(**found, **pairs, quantiles=quantiles, histogram=histogram, parent=parent, children=children)

    # Another SAE with the same latents

    def check(self, sae: SAEModel) -> None:
        """Raises `ValueError` where this is no index of this SAE's latents, in this order."""
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
        """The same index for an SAE that was sorted, truncated or pruned: latent n is latent n of that.

        Relations to latents that it lacks are left out.

        Raises:
            `ValueError`: if it has latents that are not in the index.
        """
        table = self.table(["latent_id", "fingerprint"])
        places = {key: place for place, key in enumerate(table["latent_id"].to_pylist())}
        wanted = [places.get(key, -1) for key in sae.latent_ids.tolist()]
        missing = wanted.count(-1)
        found = np.array(wanted)
        if not missing:
            missing = int((table["fingerprint"].to_numpy()[found] != fingerprints(sae)).sum())
        if missing:
            raise ValueError(
                f"{missing} of the SAE's {len(wanted)} latents are not those of this index: it is of another SAE, or "
                "they were merged or trained further. Build an index of this SAE."
            )
        return FeatureIndex(self.about, self._locate, found if self._places is None else self._places[found])

    @cached_property
    def _numbers(self) -> np.ndarray:
        """New number of each latent of the file; -1 where it is gone. One more entry, where -1 points."""
        numbers = np.full(self.about["num_latents"] + 1, -1)
        numbers[self._places] = np.arange(len(self._places))
        return numbers

    def _renumbered(self, latents: np.ndarray) -> np.ndarray:
        return self._numbers[latents]

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


# Reading


def _in_folder(folder: Path):
    def locate(name: str) -> Path:
        return folder / name

    return locate


def _on_hub(repo: str, subfolder: str, revision: str | None, token: str | None):
    place = "/".join(part for part in (subfolder.strip("/"), FOLDER) if part)

    def locate(name: str) -> Path:
        try:
            return Path(hf_hub_download(repo, f"{place}/{name}", revision=revision, token=token))
        except EntryNotFoundError:
            return Path(place) / name  # said to be missing where it is read

    return locate


def _checked(locate, source):
    """`locate` that knows how long files have to be."""

    def check(name: str, size: int) -> Path:
        path = locate(name)
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(
                f"The feature index of {source} is damaged: {name} is missing or not {size} bytes long. Build or "
                "download it again."
            )
        return path

    return check


def _about(path: Path, source) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{source} has no finished feature index. Build one with `build_index` or `matryoshka-sae index`."
        )
    try:
        about = json.loads(path.read_text())
        done = about["done"] and about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): damaged. Build the index anew.") from error
    if done != FORMAT:
        raise ValueError(f"{path} is no finished index of format {FORMAT!r}, but of {about['format']!r}.")
    return about


def _opened(path: Path) -> pq.ParquetFile:
    return _read(lambda: pq.ParquetFile(path, memory_map=True, page_checksum_verification=True))


def _read(action):
    try:
        return action()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"The feature index is damaged ({error}). Build or download it again.") from error


# Writing


def write_index(
    folder: Path,
    about: dict[str, Any],
    latents: dict[str, Any],
    contexts: Iterable[pa.RecordBatch | pa.Table],
) -> None:
    """Write the files; they are complete before they take their names, and `index.json` comes last.

    Args:
        folder (`Path`): The index's own.
        about (`dict`): What goes into `index.json`.
        latents (`dict[str, Any]`): Columns of `latents.parquet`.
        contexts (`Iterable[pa.Table]`): The contexts of as many latents each as are in a row group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged = {name: folder / f".{name}.{os.getpid()}" for name in (LATENTS, CONTEXTS, INDEX)}
    options = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": ["kind"]}
    try:
        table = pa.table(
            [pa.array(latents[name], LATENT_SCHEMA.field(name).type) for name in LATENT_SCHEMA.names],
            schema=LATENT_SCHEMA,
        )
        pq.write_table(
            table, staged[LATENTS], row_group_size=LATENTS_PER_GROUP[LATENTS], **options | {"use_dictionary": False}
        )
        with pq.ParquetWriter(staged[CONTEXTS], CONTEXT_SCHEMA, **options) as writer:
            for part in contexts:
                writer.write_table(part, row_group_size=max(1, len(part)))
        sizes = {name: staged[name].stat().st_size for name in (LATENTS, CONTEXTS)}
        about = {"format": FORMAT, **about, "files": sizes, "done": True}
        staged[INDEX].write_text(json.dumps(about, indent=2) + "\n")
        (folder / INDEX).unlink(missing_ok=True)  # from here on until the end there is no finished index
        for name, path in staged.items():
            os.replace(path, folder / name)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def list_column(rows: Tensor | np.ndarray, kept: np.ndarray | None = None) -> pa.Array:
    """A column of lists from a matrix; `kept` says which entries are in."""
    rows = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    sizes = np.full(len(rows), rows.shape[1]) if kept is None else kept.sum(1)
    values = rows.reshape(-1) if kept is None else rows[kept]
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], sizes.cumsum()]), pa.int32()), pa.array(values))
