"""Sentence embeddings as hidden states: one row per text, pooled and normalised as a sentence-transformers model does.

`hookpoints: [sentence_embedding]` in a run means these.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..assets.language_model import embedded_lm_path
from ..common.data_source import DatasetConfig
from .language_model import EMBEDDED
from .text.documents import load_documents


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


SENTENCE_EMBEDDING = "sentence_embedding"
"""The hookpoint that stands for a text's embedding."""

_READ = 4096  # texts that are embedded between two looks at the data set


def load_sentence_transformer(model: str, revision: str | None = None) -> "SentenceTransformer":
    """A sentence-transformers model; of a plain transformers model that library takes its own default pooling.

    Args:
        model (`str`): Folder or Hub id, or `"embedded"`.
        revision (`str`, *optional*): Branch, tag or commit.

    Raises:
        `ValueError`: if sentence-transformers is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"`{SENTENCE_EMBEDDING}` needs sentence-transformers: `pip install 'hf_matryoshka_sae[retrieval]'`."
        ) from error
    if model == EMBEDDED:
        model = str(embedded_lm_path())
    try:
        return SentenceTransformer(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"The sentence-transformers model {model!r} cannot be loaded: {error}") from error


def sentence_embeddings(
    model: "str | SentenceTransformer",
    dataset: DatasetConfig,
    most: int,
    revision: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    show: bool = True,
) -> Tensor:
    """The embeddings of a data set's texts, `(N, D)` in float32 on the CPU.

    Args:
        model (`str` or `SentenceTransformer`): See [`load_sentence_transformer`].
        dataset ([`DatasetConfig`]): Texts; a longer one than the model reads is cut, as that model does.
        most (`int`): At most so many texts, in an order that follows from the seed.
        revision (`str`, *optional*): Branch, tag or commit of the model.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
        batch_size (`int`, *optional*, defaults to 64): Texts that the model reads at once.
        show (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Raises:
        `ValueError`: as [`load_sentence_transformer`] and [`load_documents`]; if there is no text.
    """
    encoder = load_sentence_transformer(model, revision) if isinstance(model, str) else model
    documents, rows, count = load_documents(dataset, shuffle=True, seed=seed), [], 0
    with tqdm(desc="sentence embeddings", unit="texts", disable=not show) as bar:
        while count < most and (texts := documents.take(min(_READ, most - count))):
            embedded = encoder.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
            rows.append(embedded.float().cpu())
            count += len(texts)
            bar.update(len(texts))
    if not rows:
        raise ValueError(f"The data set '{dataset.path}' holds no text to embed.")
    return torch.cat(rows)
