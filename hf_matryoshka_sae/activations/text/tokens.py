"""Token batches: documents tokenised into windows of one length, and which of their positions are trained on.

Packed (the default), documents follow each other in one long line of tokens, which is cut into windows. Where the
tokenizer has a BOS token each document begins with it, and so does each window; where it has none, EOS (for encoders
such as BERT: SEP) ends each document. Windows carry the special tokens that the tokenizer puts around any text, so an
encoder sees `[CLS] ... [SEP]`. Not packed, a document is a row: truncated, or padded on the right.

Shapes: B windows, S tokens in a window.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...common.logs import is_first_process
from .documents import DatasetConfig, Documents, IndexedDocuments, load_documents


logger = logging.getLogger(__name__)

EXCLUSIONS = ("special", "first", "none")
_DOCUMENTS_AT_ONCE = 64  # enough for the tokenizer's threads, few enough that a saved state stays small


@dataclass
class TokenBatch:
    """Windows of tokens.

    Args:
        input_ids (`Tensor`): `[B, S]`, int64.
        attention_mask (`Tensor`): `[B, S]`, int64, 0 at padding.
        keep (`Tensor`): `[B, S]`, bool, positions whose hidden states are used.
        padded (`bool`): whether there may be padding; without it the model need not look at `attention_mask`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    keep: Tensor
    padded: bool = True

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Return the same batch on another device."""
        tensors = (self.input_ids, self.attention_mask, self.keep)
        return TokenBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors), self.padded)


class TokenStream:
    """Token batches of a data set, endless unless `num_epochs` is given, resumable at any batch.

    Args:
        documents ([`Documents`] or `list[str]`): this process's documents, see [`load_documents`].
        tokenizer (`PreTrainedTokenizerBase`): the language model's tokenizer.
        context_length (`int`): tokens in a window, special tokens included.
        batch_size_sequences (`int`): windows in a batch.
        pack (`bool`, *optional*, defaults to `True`): cut windows from joined documents; otherwise one document a row.
        add_bos (`bool`, *optional*, defaults to `True`): put the tokenizer's special tokens (BOS; CLS and SEP) around
            each window.
        exclude (`str`, *optional*, defaults to `"special"`): positions left out of `keep`. `"special"`: position 0,
            special tokens anywhere (BOS between documents, chat markers) and padding; `"first"`: position 0 and
            padding; `"none"`: padding only. Position 0 counts as special in every model: it is where attention
            rests, and its hidden state can be orders of magnitude longer than the others.
        num_epochs (`int`, *optional*): passes over the documents; `None` never ends, so that no process runs out
            before another. In a finite stream the last batch may be smaller, and packed tokens that do not fill a
            window are dropped.

    Raises:
        `ValueError`: an option is out of range, or a whole epoch has no token.
    """

    def __init__(
        self,
        documents: Documents | list[str],
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        batch_size_sequences: int,
        *,
        pack: bool = True,
        add_bos: bool = True,
        exclude: str = "special",
        num_epochs: int | None = None,
    ) -> None:
        if exclude not in EXCLUSIONS:
            raise ValueError(f"`exclude` must be one of {', '.join(EXCLUSIONS)}, got '{exclude}'.")
        if batch_size_sequences < 1:
            raise ValueError(f"`batch_size_sequences` must be at least 1, got {batch_size_sequences}.")
        self.documents = IndexedDocuments(documents) if isinstance(documents, list) else documents
        self.tokenizer, self.context_length = tokenizer, context_length
        self.batch_size_sequences, self.pack, self.add_bos = batch_size_sequences, pack, add_bos
        self.exclude, self.num_epochs, self.epoch = exclude, num_epochs, 0
        self._frame, self._encode = _Frame.of(tokenizer, add_bos), _encoder(tokenizer)
        self._body = context_length - len(self._frame.prefix) - len(self._frame.suffix)
        if self._body < 1:
            raise ValueError(f"`context_length` must leave room for text beside special tokens, got {context_length}.")
        self._special = _special_ids(tokenizer) if exclude == "special" else torch.tensor([], dtype=torch.long)
        self._pending = torch.tensor([], dtype=torch.long)  # packed: tokens not yet in a window
        self._rows: list[list[int]] = []  # not packed: documents not yet in a batch
        self._tokens_this_epoch = 0
        # The next documents are read and tokenised in a thread while the model works. A saved position is therefore
        # that of the documents when the last tokens taken from the thread had been read, not where the thread is now.
        self._reader = ThreadPoolExecutor(1)
        self._ahead: Future[tuple[Tensor | list[list[int]] | None, dict[str, Any]]] | None = None
        self._position = self.documents.state_dict()

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        return self._next_packed() if self.pack else self._next_rows()

    def _next_packed(self) -> TokenBatch:
        batch_tokens = self.batch_size_sequences * self._body
        while len(self._pending) < batch_tokens and self._read():
            pass
        num_windows = min(len(self._pending) // self._body, self.batch_size_sequences)
        if num_windows == 0:
            raise StopIteration
        used = num_windows * self._body
        body, self._pending = self._pending[:used].view(num_windows, self._body), self._pending[used:]
        prefix, suffix = (torch.tensor(ids, dtype=torch.long) for ids in (self._frame.prefix, self._frame.suffix))
        input_ids = torch.cat([prefix.expand(num_windows, -1), body, suffix.expand(num_windows, -1)], dim=1)
        return self._batch(input_ids, torch.ones_like(input_ids), padded=False)

    def _next_rows(self) -> TokenBatch:
        while len(self._rows) < self.batch_size_sequences and self._read():
            pass
        if not self._rows:
            raise StopIteration
        rows, self._rows = self._rows[: self.batch_size_sequences], self._rows[self.batch_size_sequences :]
        rows = [[*self._frame.prefix, *row[: self._body], *self._frame.suffix] for row in rows]
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0  # any id will do: the mask hides it
        input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return self._batch(input_ids, attention_mask, padded=True)

    def _batch(self, input_ids: Tensor, attention_mask: Tensor, padded: bool) -> TokenBatch:
        keep = attention_mask.bool() & ~torch.isin(input_ids, self._special)
        if self.exclude != "none":
            keep[:, 0] = False
        return TokenBatch(input_ids, attention_mask, keep, padded)

    def _read(self) -> bool:
        """Add the next documents to what is pending; return False when the last epoch is over."""
        ahead, self._ahead = self._ahead or self._reader.submit(self._encode_next), None
        rows, position = ahead.result()
        if rows is None:
            return self._next_epoch()
        self._position = position
        self._ahead = self._reader.submit(self._encode_next)
        if self.pack:
            self._tokens_this_epoch += len(rows)
            self._pending = torch.cat([self._pending, rows])
        else:
            self._tokens_this_epoch += sum(map(len, rows))
            self._rows += rows
        return True

    def _encode_next(self) -> tuple[Tensor | list[list[int]] | None, dict[str, Any]]:
        """Return tokens of the next documents, in one line where they are packed, and the position after them.

        Tokens are `None` at the end of the epoch. This runs in another thread, so that its work costs no time.
        """
        texts = self.documents.take(_DOCUMENTS_AT_ONCE)
        if not texts:
            return None, {}
        rows = [self._frame.strip(ids) for ids in self._encode(texts)]
        rows = [ids for ids in rows if ids]
        if self.pack:
            line = chain.from_iterable((*self._frame.before, *ids, *self._frame.after) for ids in rows)
            return torch.tensor(list(line), dtype=torch.long), self.documents.state_dict()
        return rows, self.documents.state_dict()

    def _next_epoch(self) -> bool:
        if self._tokens_this_epoch == 0:
            raise ValueError("The data set has no text: all of its documents are empty.")
        if self.epoch + 1 == self.num_epochs:
            return False
        if self.epoch == 0:
            logger.warning("All documents have been read once; reading them again, in another order if shuffled.")
        self.epoch += 1
        self._tokens_this_epoch = 0
        self.documents.next_epoch()
        self._position = self.documents.state_dict()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the position, with tokens read but not yet given out; JSON-able values and tensors."""
        tokens = self._pending if self.pack else torch.tensor([*chain.from_iterable(self._rows)], dtype=torch.long)
        return {
            "epoch": self.epoch,
            "tokens_this_epoch": self._tokens_this_epoch,
            "documents": self._position,
            "pending": tokens.to(torch.int32),
            "pending_lengths": torch.tensor([len(row) for row in self._rows], dtype=torch.int32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, given the same documents and options."""
        if self._ahead is not None:
            wait([self._ahead])
            self._ahead = None
        self.epoch, self._tokens_this_epoch = state["epoch"], state["tokens_this_epoch"]
        self.documents.load_state_dict(state["documents"])
        self._position = state["documents"]
        tokens = state["pending"].long()
        if self.pack:
            self._pending = tokens
        else:
            self._rows = [row.tolist() for row in tokens.split(state["pending_lengths"].tolist())]


@dataclass
class _Frame:
    """Special tokens around each window (`prefix`, `suffix`) and around each packed document (`before`, `after`)."""

    prefix: list[int]
    suffix: list[int]
    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, around_windows: bool) -> "_Frame":
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        prefix, suffix = _template(tokenizer)
        if suffix:  # an encoder: the token that ends a text also separates texts
            before, after = [], suffix
        else:
            before, after = ([bos], []) if bos is not None else ([], [eos] if eos is not None else [])
        # GPT-2 and others have a BOS token which their tokenizers do not add by themselves.
        prefix = prefix or before
        return cls(prefix, suffix, before, after) if around_windows else cls([], [], before, after)

    def strip(self, ids: list[int]) -> list[int]:
        """Return a document without the BOS which a chat template may have written already."""
        return ids[1:] if ids[:1] == self.before and self.before else ids


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Return a function from texts to token ids without special tokens around them."""
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # A copy, because it works in another thread and a backend must not be reconfigured meanwhile. `encode_batch_fast`
    # computes no offsets, which cost a third of the time and are not needed here.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after each window: `[BOS]` and none, or `[CLS]` and `[SEP]`."""
    frame = _Frame.of(tokenizer, True)
    return frame.prefix, frame.suffix


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # An unknown word is text all the same, unless its token also has a special job.
    names = {name: ids for name, ids in tokenizer.special_tokens_map.items() if name != "unk_token"}
    tokens = chain.from_iterable(value if isinstance(value, list) else [value] for value in names.values())
    return torch.tensor(sorted(tokenizer.convert_tokens_to_ids([str(token) for token in tokens])), dtype=torch.long)


def heldout_batches(
    dataset: DatasetConfig | Documents | list[str],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    tokens: int,
    batch_size_sequences: int = 8,
    **options: Any,
) -> list[TokenBatch]:
    """Return the first kept tokens of an evaluation data set: in file order, one epoch, the same on every process.

    Args:
        dataset ([`DatasetConfig`], [`Documents`] or `list[str]`): the evaluation text.
        tokenizer (`PreTrainedTokenizerBase`): the language model's tokenizer.
        context_length (`int`): tokens in a window.
        tokens (`int`): kept tokens to read, in all batches together.
        batch_size_sequences (`int`, *optional*, defaults to `8`): windows in a batch.
        options: `pack`, `add_bos` and `exclude` of [`TokenStream`].

    Returns:
        `list[TokenBatch]`: batches with `tokens` kept positions in all, or fewer, with a warning, where the data set
        is smaller.

    Raises:
        `ValueError`: the data set does not fill one window.
    """
    documents = load_documents(dataset, tokenizer) if isinstance(dataset, DatasetConfig) else dataset
    stream = TokenStream(documents, tokenizer, context_length, batch_size_sequences, num_epochs=1, **options)
    batches = list(_first(stream, tokens))
    num_tokens = sum(int(batch.keep.sum()) for batch in batches)
    if num_tokens == 0:
        raise ValueError(
            f"The evaluation data set gives no token to evaluate on: it does not fill one window of {context_length}"
            " tokens. Use more text, a smaller context_length or pack=False."
        )
    if num_tokens < tokens and is_first_process():
        logger.warning("The evaluation data set has %d tokens, fewer than the %d asked for.", num_tokens, tokens)
    return batches


def _first(batches: Iterable[TokenBatch], tokens: int) -> Iterator[TokenBatch]:
    """Yield batches until `tokens` positions are kept; of the last batch, only the windows and positions needed."""
    left = tokens
    for batch in batches:
        counted = batch.keep.flatten().cumsum(0).view_as(batch.keep)
        keep = batch.keep & (counted <= left)
        num_windows = int(keep.any(1).nonzero().max()) + 1 if keep.any() else 0
        if num_windows:
            tensors = (batch.input_ids, batch.attention_mask, keep)
            yield TokenBatch(*(tensor[:num_windows] for tensor in tensors), batch.padded)
        left -= int(keep.sum())
        if left <= 0:
            return
