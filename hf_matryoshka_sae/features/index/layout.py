"""The files of a feature index: names, columns, what a page holds, and writing them.

    features/index.json         what the index is of; written last, so an index without it is unfinished
    features/latents.parquet    a row for each latent
    features/contexts.parquet   a row for each context, those of a latent together

Row groups hold a fixed number of latents, so that one latent is found by division and read alone.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from ...common.files import as_json
from ...models import SAEModel


INDEX, LATENTS, CONTEXTS = "index.json", "latents.parquet", "contexts.parquet"
FORMAT = "hf_matryoshka_sae.feature_index/1"
LATENTS_PER_GROUP = {LATENTS: 256, CONTEXTS: 64}
TOP = "top"

SCALARS = {
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
    [*SCALARS.items(), ("histogram_start", pa.int16()), *((name, pa.list_(kind)) for name, kind in _LISTS.items())]
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


def is_hub_id(source: str) -> bool:
    """Whether a name could be a repository's; one that could not is a folder's."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def fingerprints(sae: SAEModel) -> np.ndarray:
    """A number for each latent, `(F,)`, that follows from its encoder row rounded to bfloat16.

    It stays when latents are sorted, cut off or saved in a smaller type, and tells latents of other SAEs.
    """
    bits = sae.W_enc.detach().cpu().bfloat16().view(torch.int16).numpy().astype(np.uint16).astype(np.uint64)
    factors = np.arange(1, bits.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    with np.errstate(over="ignore"):
        return ((bits + np.uint64(1)) * factors).sum(1, dtype=np.uint64).view(np.int64)


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
        staged[INDEX].write_text(as_json(about, indent=2) + "\n")
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
