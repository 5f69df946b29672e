"""Hidden states of any transformers model: text, token batches, an early-exit forward pass, shuffled activations."""

from .cache.fingerprint import cache_fingerprint
from .cache.format import has_cache
from .cache.reader import CachedActivationStream
from .cache.writer import build_cache, wait_for_cache
from .hookpoints import harvest, hookpoint_widths, resolve_hookpoints
from .language_model import load_language_model
from .prefetch import PrefetchedStream
from .shuffled import ShuffleBuffer
from .splice import has_lm_loss, is_masked_lm, spliced_logits, spliced_losses
from .states import RowStream, RowTable, States, StatesStream, target_of
from .statistics import ActivationStatistics, estimate_statistics
from .stream import ActivationStream, harvest_rows
from .text.documents import DatasetConfig, Documents, IndexedDocuments, StreamedDocuments, load_documents, open_dataset
from .text.holdout import Split
from .text.tokens import TokenBatch, TokenStream, heldout_batches
from .text.windows import WindowShuffle


__all__ = [
    "ActivationStatistics",
    "ActivationStream",
    "CachedActivationStream",
    "DatasetConfig",
    "Documents",
    "IndexedDocuments",
    "PrefetchedStream",
    "RowStream",
    "RowTable",
    "ShuffleBuffer",
    "Split",
    "States",
    "StatesStream",
    "StreamedDocuments",
    "TokenBatch",
    "TokenStream",
    "WindowShuffle",
    "build_cache",
    "cache_fingerprint",
    "estimate_statistics",
    "harvest",
    "harvest_rows",
    "has_cache",
    "has_lm_loss",
    "heldout_batches",
    "hookpoint_widths",
    "is_masked_lm",
    "load_documents",
    "load_language_model",
    "open_dataset",
    "resolve_hookpoints",
    "spliced_logits",
    "spliced_losses",
    "target_of",
    "wait_for_cache",
]
