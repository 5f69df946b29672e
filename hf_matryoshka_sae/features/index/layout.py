"""The files of a feature index: their names and columns, one latent's data, and writing them.

    features/index.json         what the index is of; written last, so an index without it is unfinished
    features/latents.parquet    a row for each latent
    features/contexts.parquet   a row for each context, those of a latent together
    features/showcase.json      what the SAE is worth at twelve widths, and a sample text; see `showcase`

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
from ..bands import EDGES, Band
from ..telling import Spell, context_line, feature_html, feature_text, speller


INDEX, LATENTS, CONTEXTS, SHOWCASE = "index.json", "latents.parquet", "contexts.parquet", "showcase.json"
FORMAT = "hf_matryoshka_sae.feature_index/1"
SHOWCASE_VERSION = 1
LATENTS_PER_GROUP = {LATENTS: 256, CONTEXTS: 64}
TOP, BAND_KIND = "top", "band"

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
BAND = pa.struct([("firings", pa.int64()), ("precision", pa.float32()), ("base", pa.float32())])
LATER = {"candidates": pa.int32(), "candidate_scores": pa.float32(), "bands": BAND, "own_tokens": pa.int32()}
"""Columns of lists that an index of an earlier version lacks."""
LATENT_SCHEMA = pa.schema(
    [
        *SCALARS.items(),
        ("histogram_start", pa.int16()),
        *((name, pa.list_(kind)) for name, kind in (_LISTS | LATER).items()),
    ]
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


@dataclass(repr=False)
class Context:
    """A run of tokens around one on which a latent fires; it prints as text.

    Args:
        kind (`str`): `"top"`, the number of the context's quantile of activation (`"0"` is the weakest), or `"band"`
            for one that stands for its band of activation alone.
        token_ids (`np.ndarray` of shape `(W,)`): Token ids.
        activations (`np.ndarray` of shape `(W,)`): Activation of the latent on each token.
        peak (`int`): Index in the context of the token that the context is around.
        value (`float`): Activation on that token.
        window (`int`): Number of the window of the text that holds that token.
        position (`int`): Position of that token in the window.
        spell (`Spell`, *optional*): Gives token ids their text; by default they are shown as `#id`.
    """

    kind: str
    token_ids: np.ndarray
    activations: np.ndarray
    peak: int
    value: float
    window: int
    position: int
    spell: Spell | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return context_line(self, self.spell or speller(None)).strip()


@dataclass(repr=False)
class Feature:
    """One latent in an index; it prints as text. Latents are numbered by their position in the SAE.

    Args:
        latent (`int`): Position in the SAE.
        latent_id (`int`): Position it had before any sorting or pruning.
        count (`int`): Number of tokens on which it fires.
        frequency (`float`): Share of tokens on which it fires.
        mean (`float`): Mean activation `E[a]` over all tokens.
        mean_square (`float`): Energy `E[a^2]` over all tokens.
        max (`float`): Largest activation.
        first_position_share (`float`): Share of its firings that are at the first position of a window.
        quantiles (`dict[float, float]`): Quantiles of its activation where it fires, by probability.
        histogram (`tuple[np.ndarray, np.ndarray]`): Edges `(n + 1,)` and counts `(n,)` of its activations.
        promoted (`list[tuple[int, float]]`): Tokens whose logits it raises most and its effects on them, strongest
            first; empty where the model has no unembedding.
        suppressed (`list[tuple[int, float]]`): Tokens whose logits it lowers most and its effects on them.
        neighbours (`list[tuple[int, float]]`): Latents with the most similar decoder rows, and the cosines.
        cofiring (`list[tuple[int, float]]`): Latents that fire on most of its tokens, and on which share of them.
        parent (`int`, *optional*): Latent of a narrower prefix that it refines.
        parent_score (`float`, *optional*): Score of the parent.
        children (`list[int]`): Latents of wider prefixes that refine it.
        candidates (`list[tuple[int, float]]`): Candidates for its parent and their scores, best first; those below the
            threshold of a parent are among them.
        bands (`list[Band]`): Its firings by bands of activation, weakest first; empty for a dead latent.
        own_tokens (`list[int]`): Token ids under its strongest firings, the most frequent first.
        contexts (`list[Context]`): Strongest contexts first, then those of each quantile, then others.
        label (`str`, *optional*): What somebody called it; see [`read_labels`].
        spell (`Callable`, *optional*): From token ids to their texts, for printing.
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
    candidates: list[tuple[int, float]] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    own_tokens: list[int] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)
    label: str | None = None
    spell: Spell | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return feature_text(self)

    def _repr_html_(self) -> str:
        return feature_html(self)

    @property
    def top_contexts(self) -> list[Context]:
        """Contexts in which it fires most, strongest first."""
        return [context for context in self.contexts if context.kind == TOP]

    @property
    def quantile_contexts(self) -> dict[int, list[Context]]:
        """Random contexts by quantile of activation, weakest quantile first."""
        by_quantile: dict[int, list[Context]] = {}
        for context in self.contexts:
            if context.kind.isdecimal():
                by_quantile.setdefault(int(context.kind), []).append(context)
        return dict(sorted(by_quantile.items()))

    @property
    def band_contexts(self) -> list[list[Context]]:
        """Contexts of each band of activation, weakest band first; of the strongest its strongest first."""
        by_band: list[list[Context]] = [[] for _ in EDGES[1:]]
        seen = set()
        for context in self.contexts:
            if (context.window, context.position) not in seen and self.max > 0:
                seen.add((context.window, context.position))
                by_band[sum(context.value >= edge * self.max for edge in EDGES[1:-1])].append(context)
        return by_band


def is_hub_id(source: str) -> bool:
    """Return whether a name could be that of a repository; if not, it is a folder's."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def fingerprints(sae: SAEModel) -> np.ndarray:
    """Return a hash of each latent's encoder row rounded to bfloat16, `(F,)`.

    It survives sorting, pruning and saving in a smaller type, and differs between SAEs.
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
    showcase: dict[str, Any] | None = None,
) -> None:
    """Write the files of an index; they are complete before they take their names, `index.json` last.

    Args:
        folder (`Path`): Folder of the index.
        about (`dict`): Content of `index.json`.
        latents (`dict[str, Any]`): Columns of `latents.parquet`.
        contexts (`Iterable[pa.Table]`): Rows of `contexts.parquet`, one table for each row group.
        showcase (`dict`, *optional*): Content of `showcase.json`; by default there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = (LATENTS, CONTEXTS, *([] if showcase is None else [SHOWCASE]))
    staged = {name: folder / f".{name}.{os.getpid()}" for name in (*names, INDEX)}
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
        if showcase is not None:
            staged[SHOWCASE].write_text(as_json(showcase) + "\n", encoding="utf-8")
        sizes = {name: staged[name].stat().st_size for name in names}
        about = {"format": FORMAT, **about, "files": sizes, "done": True}
        staged[INDEX].write_text(as_json(about, indent=2) + "\n", encoding="utf-8")
        for name in (INDEX, SHOWCASE):  # from here on until the end there is no finished index
            (folder / name).unlink(missing_ok=True)
        for name, path in staged.items():
            os.replace(path, folder / name)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def list_column(rows: Tensor | np.ndarray, inside: np.ndarray | None = None) -> pa.Array:
    """Return a column of lists from a matrix; `inside` is a mask of the entries that belong to them."""
    rows = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    sizes = np.full(len(rows), rows.shape[1]) if inside is None else inside.sum(1)
    values = rows.reshape(-1) if inside is None else rows[inside]
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], sizes.cumsum()]), pa.int32()), pa.array(values))
