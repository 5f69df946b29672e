"""Documents: the text that a language model reads, from the Hub, from files or from the package.

A `Documents` object hands out texts in order, epoch after epoch. Each process of `world_size` reads its own share: the
shares are disjoint and together are the whole data set. Position and order can be saved and restored exactly.
"""

import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ...common.data_source import EMBEDDED, LOADERS, DatasetConfig, local_files
from ...common.hub_access import check_reachable


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


logger = logging.getLogger(__name__)

_SHUFFLE_BUFFER = 10_000  # documents held to shuffle a streamed data set, which has no random access


class Documents(Protocol):
    """Documents of one process; the two implementations differ in whether random access exists."""

    def take(self, count: int) -> list[str]:
        """Return the next `count` documents of this epoch that are not blank; fewer, then none, at its end."""

    def next_epoch(self) -> None:
        """Start again, in the next epoch's order."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""


class IndexedDocuments:
    """Documents with random access: a list of texts, or rows of a `datasets.Dataset`.

    Shuffling is one permutation of the whole corpus, different in each epoch and equal on all processes, of which the
    process keeps every `world_size`-th entry.

    Args:
        rows (`list[str]` or `datasets.Dataset`): all documents.
        column (`str`, *optional*): column of a `datasets.Dataset` that holds the text.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): renders chat messages.
        shuffle (`bool`, *optional*, defaults to `False`): permute the documents.
        seed (`int`, *optional*, defaults to `0`): seed of the permutation; epoch e uses `seed + e`.
        rank (`int`, *optional*, defaults to `0`): number of this process.
        world_size (`int`, *optional*, defaults to `1`): number of processes.

    Raises:
        `ValueError`: there are fewer documents than processes.
    """

    def __init__(
        self,
        rows: "list[str] | Dataset",
        column: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(rows) < world_size:
            raise ValueError(
                f"The data set has {len(rows)} documents for {world_size} processes; each process needs at least one."
                " Use a larger data set or fewer processes."
            )
        self._rows, self._column, self._tokenizer = rows, column, tokenizer
        self._shuffle, self._seed, self._share = shuffle, seed, (rank, world_size)
        self._start(epoch=0, position=0)

    def _start(self, epoch: int, position: int) -> None:
        rank, world_size = self._share
        order = torch.arange(len(self._rows))
        if self._shuffle:
            order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(self._seed + epoch))
        self._order, self._epoch, self._position = order[rank::world_size], epoch, position

    def take(self, count: int) -> list[str]:
        """Return the next `count` documents of this epoch that are not blank; fewer, then none, at its end."""
        texts = []
        while len(texts) < count and self._position < len(self._order):
            indices = self._order[self._position : self._position + count - len(texts)].tolist()
            self._position += len(indices)
            texts += [text for text in map(self._render, self._read(indices)) if text.strip()]
        return texts

    def _read(self, indices: list[int]) -> list:
        if self._column is None:
            return [self._rows[i] for i in indices]
        return self._rows[indices][self._column]

    def _render(self, value: Any) -> str:
        return render(value, self._column, self._tokenizer)

    def next_epoch(self) -> None:
        """Start again, in the next epoch's order."""
        self._start(self._epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._start(state["epoch"], state["position"])


class StreamedDocuments:
    """Documents of a `datasets.IterableDataset`, already shuffled and split by process.

    Args:
        dataset (`datasets.IterableDataset`): this process's share of the documents.
        column (`str`): column that holds the text.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): renders chat messages.
    """

    def __init__(
        self, dataset: "IterableDataset", column: str, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self._dataset, self._column, self._tokenizer = dataset, column, tokenizer
        self._epoch = 0
        self._rows: Iterator[dict] | None = None

    def take(self, count: int) -> list[str]:
        """Return the next `count` documents of this epoch that are not blank; fewer, then none, at its end."""
        if self._rows is None:
            self._rows = iter(self._dataset)
        texts = []
        for row in self._rows:
            if self._column not in row:
                raise missing_column(self._column, list(row))
            text = render(row[self._column], self._column, self._tokenizer)
            texts += [text] if text.strip() else []
            if len(texts) == count:
                break
        return texts

    def next_epoch(self) -> None:
        """Start again, in the next epoch's order."""
        self._epoch += 1
        self._dataset.set_epoch(self._epoch)
        self._rows = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"epoch": self._epoch, "dataset": self._dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._epoch = state["epoch"]
        self._dataset.set_epoch(self._epoch)
        self._dataset.load_state_dict(state["dataset"])
        self._rows = None


def render(value: Any, column: str | None, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return one cell of the text column as text: a string as it is, chat messages through the chat template."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not (isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)):
        raise ValueError(
            f"Column '{column}' holds a {type(value).__name__}; expected text or a list of chat messages with 'role'"
            " and 'content'. Choose another column."
        )
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"Column '{column}' holds chat messages, but the tokenizer has no chat template to render them. Use the"
            " tokenizer of an instruct model, or a column of plain text."
        )
    return tokenizer.apply_chat_template(value, tokenize=False) if value else ""


def load_documents(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shuffle: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Documents:
    """Open the data set that `config` describes; return this process's documents.

    Args:
        config ([`DatasetConfig`]): the data set.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): renders chat messages; not needed for plain text.
        shuffle (`bool`, *optional*, defaults to `False`): shuffle documents: a permutation of the whole corpus, or,
            for a streamed data set, `datasets`' shuffle of shards and of a window of documents.
        seed (`int`, *optional*, defaults to `0`): seed of the order; must be equal on all processes.
        rank (`int`, *optional*, defaults to `0`): number of this process.
        world_size (`int`, *optional*, defaults to `1`): number of processes.

    Raises:
        `ValueError`: a path, split or column does not exist, the data set is empty, or the Hub cannot be reached.
    """
    if config.path == EMBEDDED:
        return IndexedDocuments(_embedded(config.split), None, None, shuffle, seed, rank, world_size)
    dataset = open_dataset(config)
    columns = dataset.column_names
    if columns is not None and config.column not in columns:
        raise missing_column(config.column, columns)
    if not hasattr(dataset, "__len__"):
        return StreamedDocuments(_share(dataset, shuffle, seed, rank, world_size), config.column, tokenizer)
    if len(dataset) == 0:
        raise ValueError(f"The data set '{config.path}' (split '{config.split}') is empty.")
    dataset = dataset.select_columns([config.column])
    return IndexedDocuments(dataset, config.column, tokenizer, shuffle, seed, rank, world_size)


def _share(dataset: "IterableDataset", shuffle: bool, seed: int, rank: int, world_size: int) -> "IterableDataset":
    from datasets.distributed import split_dataset_by_node

    if shuffle:  # before the split, so that all processes agree on the order they divide
        dataset = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return split_dataset_by_node(dataset, rank, world_size) if world_size > 1 else dataset


def _embedded(split: str) -> list[str]:
    from ...assets import embedded_text

    if split not in ("train", "heldout"):
        raise ValueError(f"The embedded text has the splits 'train' and 'heldout', got split='{split}'.")
    return embedded_text("heldout") if split == "heldout" else embedded_text()


def open_dataset(config: DatasetConfig) -> Any:
    """Open a data set on the Hub or in files; return its rows with all columns.

    Raises:
        `ValueError`: if the data set does not exist or cannot be read.
    """
    import datasets

    files = local_files(config)
    if files is None:
        return _open_hub(config)
    kind = LOADERS[files[0].suffix]
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"The data set '{config.path}' is empty: its files have no content.")
    names = [str(file) for file in files]
    try:
        return datasets.load_dataset(
            kind, data_files=names, split="train", streaming=bool(config.streaming), **options
        )
    except Exception as error:  # datasets raises many kinds; the cause is the one that says what is wrong
        raise ValueError(
            f"The data set '{config.path}' is empty or cannot be read as {kind}: {error.__cause__ or error}"
        ) from error


def _open_hub(config: DatasetConfig) -> Any:
    import datasets

    streaming = True if config.streaming is None else config.streaming
    try:
        if not (Path(datasets.config.HF_DATASETS_CACHE) / config.path.replace("/", "___")).is_dir():
            check_reachable(config.path, "README.md", repo_type="dataset")
        return datasets.load_dataset(config.path, config.name, split=config.split, streaming=streaming)
    except Exception as error:  # datasets raises many kinds; each means that the data set cannot be read
        raise ValueError(
            f"Could not open the data set '{config.path}' (name {config.name}, split '{config.split}') from the Hub:"
            f" {error} Check the id, the split and the network, or pass a local .parquet, .jsonl or .txt file, or"
            f" path='{EMBEDDED}' for the text that comes with the package."
        ) from error


def missing_column(column: str, columns: list[str]) -> ValueError:
    """Return the error for a column that a data set does not have."""
    near = difflib.get_close_matches(column, columns, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return ValueError(f"The data set has no column '{column}'; its columns are {', '.join(columns)}.{hint}")
